"""Run a study, a graph of commands: `python -m pipeline.workflow +study=digits`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from pipeline.cli.errors import FAILURE, USER_ERROR, ConfigError, nearest
from pipeline.cli.run import run_verb
from pipeline.cli.verb import Verb

if TYPE_CHECKING:
    from pipeline.engines.profile import Profile
    from pipeline.engines.study import Step

VERB = Verb(
    "workflow",
    "Run a study: data sets, trainings, evaluations, reports and exports, as far as they are missing.",
    {
        "+study=digits": "nine architectures on scikit-learn's digits",
        "+study=digits dry_run=true": "list what would run, and why",
        "+study=digits +study.train.grid.seed=[0,1,2]": "three trainings of each",
        "+study=NAME profile=slurm jobs=20": "each step as a job of Slurm",
        "+study=NAME profile=kubernetes profile.image=NAME profile.claim=NAME": "trainings as TrainJobs",
        "+study=NAME -- --forcerun train": "arguments of Snakemake after --",
    },
    required_group="study",
    open_groups=("study", "profile.resources"),
    text_keys=("name", "studies", "out", "graph", "profile.prefix.train", "profile.prefix.evaluate"),
)
ENGINE_ARGUMENTS: list[str] = []  # those after `--`


def main(config: DictConfig) -> None:
    """Check every command of the study, write it down, and hand it to the engine; exit with code 2 where one failed."""
    from pipeline.cli.console import main_console, print_line
    from pipeline.engines import snakemake
    from pipeline.engines.checks import check_commands, check_tars
    from pipeline.engines.profile import check_scheduler

    folder, steps = read_study(config)
    profile, is_shown = build_profile(config), config.dry_run or config.graph is not None
    if config.graph is not None and Path(str(config.graph)).suffix not in snakemake.DRAWINGS:
        raise ConfigError(f"graph={config.graph} must end in one of {', '.join(snakemake.DRAWINGS)}")
    arguments = [
        *(["--keep-going"] if config.keep_going else []),
        *name_targets(ENGINE_ARGUMENTS, steps, folder=folder),
    ]
    check_commands(steps)
    check_tars(steps)
    if not is_shown:
        check_scheduler(profile.scheduler)
    program = snakemake.build_environment()
    words = snakemake.build_command_line(program, folder, profile=profile, arguments=arguments)
    with snakemake.locked(folder) as lock:
        if not is_shown:
            snakemake.write_study(steps, folder, profile=profile)
            snakemake.forget_other_parts(steps, folder)
            run_study(words, steps, folder=folder, lock=lock)
            return
        with snakemake.study_as_written(steps, folder, profile=profile):
            if config.graph is not None:
                snakemake.draw(words, Path(str(config.graph)))
                print_line(main_console(), f"wrote {config.graph}")
            else:
                print_plan(words, steps, folder=folder)


def read_study(config: DictConfig) -> tuple[Path, list[Step]]:
    """Return the folder of the study and its steps. Raises: ConfigError."""
    from hydra.core.hydra_config import HydraConfig

    from pipeline.engines.study import build_steps, check_name

    name = str(config.name or HydraConfig.get().runtime.choices["study"])
    check_name(name, place="name")
    study = OmegaConf.to_container(config.study, resolve=True)
    assert isinstance(study, dict)
    folder = Path(str(config.out)) if config.out is not None else Path(str(config.studies)) / name
    steps = build_steps({str(key): value for key, value in study.items()}, folder)
    return folder, [step.trusted() for step in steps] if config.trust else steps


def name_targets(arguments: Sequence[str], steps: Sequence[Step], *, folder: Path) -> list[str]:
    """Replace the names of steps by the files that Snakemake knows. Raises: ConfigError for one that does not exist."""
    from pipeline.engines.profile import VERBS

    known = {step.identity for step in steps}
    verbs = tuple(f"{verb}/" for verb in VERBS)
    for word in arguments:
        if word.startswith(verbs) and word not in known:
            raise ConfigError(f"there is no step {word}{nearest(word, known) or ':'} dry_run=true lists all")
    return [str(folder / "done" / word) if word in known else word for word in arguments]


def build_profile(config: DictConfig) -> Profile:
    """Build the profile. Raises: ConfigError for one that a study changes: it holds commands."""
    from hydra.core.hydra_config import HydraConfig

    from pipeline.cli.compose import compose
    from pipeline.engines.profile import read_profile

    typed = [word for word in HydraConfig.get().overrides.task if word.lstrip("+~").startswith(("profile", "jobs="))]
    if config.profile != compose("workflow", typed).profile:
        raise ConfigError("the study changes the profile, which does not count: profile= is for the command line")
    values = OmegaConf.to_container(config.profile, resolve=True)
    assert isinstance(values, dict)
    return read_profile({str(key): value for key, value in values.items()}, jobs=config.jobs)


def print_plan(words: Sequence[str], steps: Sequence[Step], *, folder: Path) -> None:
    """Print a line for each step that would run."""
    from pipeline.cli.console import main_console, print_line
    from pipeline.engines.snakemake import list_planned_steps

    found = dict(list_planned_steps(words, folder=folder))
    for step in steps:
        if step.identity in found:
            print_line(main_console(), f"{step.identity}  {found[step.identity]}")
    print_line(main_console(), f"{len(found)} of {len(steps)} steps would run")


def run_study(words: Sequence[str], steps: Sequence[Step], *, folder: Path, lock: int) -> None:
    """Run the steps; print a line for each one that has ended, and a table of the trainings."""
    from pipeline.cli.console import main_console, print_facts, print_line
    from pipeline.engines import snakemake
    from pipeline.engines.table import build_table, describe_end

    print_facts(main_console(), {"engine": str(folder / snakemake.LOG)})  # which names the jobs that wait
    codes: dict[str, int] = {}  # of each step's last try
    try:
        for ended in snakemake.run(words, steps, folder=folder, lock=lock):
            codes[ended.step.identity] = ended.code
            print_line(main_console(), describe_end(ended, folder))
    except SystemExit:
        print_line(main_console(), "stopped: the same command continues")
        raise
    failed = {identity: code for identity, code in codes.items() if code}
    current = snakemake.find_current_steps(steps, folder)
    if not codes:
        nothing = f"nothing to do: all {len(steps)} steps are done"
        some = f"no step has run: {len(current)} of {len(steps)} steps are done"
        print_line(main_console(), nothing if len(current) == len(steps) else some)
    main_console().print(build_table(steps, current=current, failed=failed))
    facts = {
        "done": f"{len(current)} of {len(steps)} steps",
        "runs": str(folder / "runs"),
        "logs": str(folder / "logs"),
    }
    if failed:
        facts["failed"] = (
            f"{len(failed)} of {len(steps)} steps: the same command repeats these, and runs what needs them"
        )
    elif "compare/all" in current:
        facts["comparison"] = str(folder / "comparison" / "index.html")
    print_facts(main_console(), facts)
    if failed:
        raise SystemExit(USER_ERROR if set(failed.values()) == {USER_ERROR} else FAILURE)


if __name__ == "__main__":
    if "--" in sys.argv:
        place = sys.argv.index("--")
        ENGINE_ARGUMENTS[:], sys.argv[place:] = sys.argv[place + 1 :], []
    run_verb(VERB, main)
