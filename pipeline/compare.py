"""Compare trained runs: `python -m pipeline.compare runs=[RUN,RUN]`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from pipeline.cli.errors import ConfigError
from pipeline.cli.run import fast_imports, run_verb
from pipeline.cli.verb import Verb

if TYPE_CHECKING:
    from pipeline.runs.run import Run

VERB = Verb(
    "compare",
    "Compare trained runs: accuracy with intervals, parameters, multiply-adds, receptive fields, speed.",
    {
        "runs=[NAME,OTHER]": "two runs in runs/",
        "study=digits split=val": "all trainings of a study",
    },
    aliases={"study": "study_name"},
    text_keys=("study_name", "split", "out", "folder", "studies"),
)


def main(config: DictConfig) -> None:
    """Print a table of the runs, and write a page, JSON and a Parquet table."""
    if bool(config.runs) == (config.study_name is not None):
        raise ConfigError("a comparison needs either runs=[RUN,RUN] or study=NAME")
    with fast_imports():
        from pipeline.cli.console import main_console, print_line, table_console
        from pipeline.comparison.runs import choose_split, compare_neighbours, rank_runs, read_run
        from pipeline.comparison.terminal import build_table, describe_difference
        from pipeline.comparison.write import write_comparison
        from pipeline.runs.restore import RestoredRun

    runs = [RestoredRun(run.folder, trust=bool(config.trust)) for run in find_runs(config)]
    split = choose_split(runs, None if config.split is None else str(config.split))
    found = rank_runs([read_run(run, split=split) for run in runs])
    pairs = compare_neighbours(found)
    files = write_comparison(found, pairs, split=split, folder=output_folder(config))
    table_console().print(build_table(found, split=split))
    for pair in pairs:
        print_line(main_console(), describe_difference(pair))
    for used, digests in {
        "evaluated on": [run.top1_images for run in found],
        "trained on": [run.training_images for run in found],
    }.items():
        groups = [[run.name for run, one in zip(found, digests, strict=True) if one == digest] for digest in {*digests}]
        if len(groups) > 1:
            print_line(main_console(), f"{used} different images: {'; '.join(sorted(map(', '.join, groups)))}")
    print_line(main_console(), f"wrote {', '.join(map(str, files))}")
    problem = add_to_mlflow(config, [run.run for run in runs], best=found[0].top1, files=files)
    if problem is not None:
        print_line(main_console(), f"in MLflow: {problem}")


def add_to_mlflow(config: DictConfig, runs: Sequence[Run], *, best: float | None, files: Sequence[Path]) -> str | None:
    """Make the comparison a parent of its runs in MLflow; return what is missing there and why."""
    from pipeline.build.objects import build_object
    from pipeline.tracking.mlflow_tracker import MLflowTracker
    from pipeline.tracking.parent import send_comparison
    from pipeline.tracking.tracker import Tracker

    tracker = build_object(config, "tracking", kind=Tracker)
    if not config.mlflow or not isinstance(tracker, MLflowTracker):
        return None
    name = "comparison" if config.study_name is None else study_folder(config).name
    facts = {"best/top1": best} if best is not None else {}
    return send_comparison(tracker.store, name, runs=runs, files=files, facts=facts)


def find_runs(config: DictConfig) -> list[Run]:
    """Return the runs that the config names. Raises: FileNotFoundError, ValueError."""
    from pipeline.runs.find import find_run
    from pipeline.runs.run import Run

    if config.study_name is None:
        found = [find_run(str(name), runs=Path(str(config.folder)), key="runs").run for name in config.runs]
    else:
        file = study_folder(config) / "study.yaml"
        if not file.is_file():
            raise ConfigError(f"study={config.study_name} has no {file}: python -m pipeline.workflow writes it")
        trainings = json.loads(file.read_text())["steps"]["train"]
        found = [run for run in (Run(Path(one["result"]).parent) for one in trainings.values()) if run.is_finished]
    names = [run.folder.absolute() for run in found]
    repeated = next((run.folder for run in found if names.count(run.folder.absolute()) > 1), None)
    if repeated is not None:
        raise ConfigError(f"runs: {repeated} is named twice")
    if not found:
        raise ConfigError(f"study={config.study_name} has no finished training")
    return found


def study_folder(config: DictConfig) -> Path:
    """Return the folder of the study that the config names."""
    given = Path(str(config.study_name))
    return given if (given / "study.yaml").is_file() else Path(str(config.studies)) / given


def output_folder(config: DictConfig) -> Path:
    """Return the output folder."""
    if config.out is not None:
        return Path(str(config.out))
    return (Path() if config.study_name is None else study_folder(config)) / "comparison"


if __name__ == "__main__":
    run_verb(VERB, main)
