"""Evaluate a trained run: `python -m pipeline.evaluate run=latest`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from pipeline.cli.errors import ConfigError, nearest
from pipeline.cli.run import fast_imports, run_verb
from pipeline.cli.verb import Verb

if TYPE_CHECKING:
    from data.augment.crops import CropPolicy
    from pipeline.evaluate.assess import Evaluation
    from pipeline.evaluate.job import EvaluationJob
    from pipeline.runs.restore import RestoredRun


def check_values(config: DictConfig) -> None:
    """Raise ConfigError for values that no evaluation can have, whichever run it is of."""
    from data.shards.dataset import SPLITS

    if config.split is not None and config.split not in SPLITS:
        raise ConfigError(f"split={config.split} is not one of {', '.join(SPLITS)}{nearest(config.split, SPLITS)}")
    if config.dataset == "":
        raise ConfigError("data= is empty: give the folder of a packed data set, or leave it out")
    precision = config.precision
    is_number = isinstance(precision, int | float) and not isinstance(precision, bool)
    if precision is not None and not (is_number and 0 < precision <= 1):
        raise ConfigError(f"precision={config.precision} must be a share above 0 and at most 1, such as 0.95")


VERB = Verb(
    "evaluate",
    "Evaluate a trained run on images that did not train it.",
    {
        "run=latest": "on the test split, or val where there is none",
        "run=runs/NAME split=val size=auto": "",
        "run=NAME versus=OTHER": "two runs on the same images",
        "run=NAME data=FOLDER": "on another packed data set with classes of the run",
    },
    aliases={"data": "dataset"},
    text_keys=("run", "dataset", "split", "versus", "out", "runs", "device"),
    minimums={"batch_size": 1, "seed": 0},
    check_values=check_values,
)


def main(config: DictConfig) -> None:
    """Print the metrics, and write a page, JSON and a table of predictions."""
    with fast_imports():
        from pipeline.evaluate.job import build_job
        from pipeline.evaluate.ranks import joined_ranks

    with joined_ranks() as ranks:
        job = ranks.run_on_all(lambda: build_job(config, ranks))
        found = job.evaluate()
    if found is not None:
        evaluation, crop = found
        finish(job, evaluation, crop=crop, config=config)


def finish(job: EvaluationJob, evaluation: Evaluation, *, crop: CropPolicy, config: DictConfig) -> None:
    """Write the files, print the numbers, and add both to the run's page in MLflow."""
    from pipeline.cli.console import main_console, print_facts, print_line
    from pipeline.evaluate.terminal import facts_of
    from pipeline.evaluate.write import subject_of, write_evaluation
    from pipeline.runs.calibration import digest

    run, subject = job.model.run, subject_of(job.model, job.dataset, split=job.split, crop=crop)
    folder = Path(str(config.out)) if config.out is not None else run.run.evaluation / default_folder(config, job)
    index = job.dataset.index(job.split)
    storage = run.open_storage(job.dataset)
    files = write_evaluation(evaluation, subject, folder=folder, index=index, storage=storage)
    console, sha256 = main_console(), job.model.weights_sha256
    if job.is_own and config.size is None and run.is_best and digest(run.weights_file) == sha256:
        try:
            evaluation.calibration.save(run.run.calibration_file, weights_sha256=sha256)
        except OSError as error:
            text = f"temperature and threshold are not kept for predict: {error}"
            print_line(console, text)
    print_facts(console, facts_of(evaluation, subject))
    print_line(console, f"wrote {', '.join(map(str, files))}")
    problem = add_to_page(run, files=files) if config.mlflow else None
    if problem is not None:
        print_line(console, f"not on the run's page: {problem}")


def add_to_page(run: RestoredRun, *, files: Sequence[Path]) -> str | None:
    """Bring the run's page in MLflow up to date with its folder; return what is missing there and why."""
    from pipeline.tracking.tracker import Tracker

    if files[0].parent.absolute().parent != run.run.evaluation.absolute():
        return f"{files[0].parent} is not in {run.run.evaluation}"
    try:
        tracker = run.build_tracking(Tracker)
    except ValueError as error:  # the files are written already
        return str(error)
    return None if tracker is None else tracker.send(run.run).problem


def default_folder(config: DictConfig, job: EvaluationJob) -> str:
    """Return the name of the folder: the split, then options that differ from their defaults."""
    run = job.model.run
    parts = [job.split] if run.is_best else [job.split, run.weights_file.stem]
    parts += [] if job.is_own else [Path(job.dataset.name).name]  # a name could be a path
    parts += [f"size-{config.size}"] if config.size is not None else []
    parts += [f"versus-{job.other.run.run.name}"] if job.other is not None else []
    return "-".join(parts)


if __name__ == "__main__":
    run_verb(VERB, main)
