"""Checks of a study's commands, before any of them runs."""

import re
import shlex
import shutil
from collections.abc import Sequence
from importlib import import_module
from itertools import dropwhile
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.shards.indexing import find_tars
from data.shards.parallel import available_cores, map_tasks
from data.storage.location import parse_root
from pipeline.cli.check import Composed, check_command_line
from pipeline.cli.compose import compose
from pipeline.cli.errors import ConfigError, one_line
from pipeline.cli.run import check_config, fast_imports
from pipeline.engines.kubernetes.options import read_options
from pipeline.engines.snakemake import Profile
from pipeline.engines.study import Step

KUBERNETES = "pipeline.engines.kubernetes"
ASSIGNMENT = re.compile(r"\w+=")  # of an environment variable, before a program
STEPS_OF_A_TASK = 20  # which take as long as the start of a process


def check_commands(steps: Sequence[Step]) -> None:
    """Compose and check the command of each step, on all cores. Raises: ConfigError, with the step's name."""
    different = _drop_equal_commands(steps)
    tasks = [different[start : start + STEPS_OF_A_TASK] for start in range(0, len(different), STEPS_OF_A_TASK)]
    sizes = [len(task) for task in tasks]
    map_tasks(_check_steps, tasks, sizes=sizes, workers=available_cores(), label="checking", unit="commands")


def check_prefixes(profile: Profile) -> None:
    """Check the words before `python`: programs of this machine, options of Kubernetes. Raises: ConfigError."""
    for verb, prefix in profile.prefix.items():
        words = list(dropwhile(ASSIGNMENT.match, shlex.split(prefix)))
        if words and profile.executor == "local" and shutil.which(words[0]) is None:
            raise ConfigError(f"profile.prefix.{verb}={prefix}: there is no program {words[0]}")
        if KUBERNETES in words:
            options = words[words.index(KUBERNETES) + 1 :]
            try:
                read_options(options[: options.index("--")] if "--" in options else options, folder=Path.cwd())
            except ConfigError as error:
                raise ConfigError(f"profile: {error}") from None


def check_tars(steps: Sequence[Step]) -> None:
    """Look for the tars that are to be indexed. Raises: ConfigError, with the step's name, where there are none."""
    for step in steps:
        if step.verb == "index" and "@" not in step.name and not step.result.exists():
            words = dict(word.split("=", 1) for word in step.overrides)
            try:
                find_tars(parse_root(words["root"]), Path(words["out"]))
            except (ValueError, OSError) as error:
                raise ConfigError(f"{step.identity}: {one_line(error)}") from None


def _drop_equal_commands(steps: Sequence[Step]) -> list[Step]:
    """Return one step of those that differ only in the folders of runs, which composing does not read."""
    folders = ("run=", "runs=", "out=")
    found: dict[tuple[str, ...], Step] = {}
    for step in steps:
        found.setdefault((step.verb, *(word for word in step.overrides if not word.startswith(folders))), step)
    return list(found.values())


def _check_steps(steps: Sequence[Step]) -> None:
    composed: Composed = {}
    for step in steps:
        try:
            _check_step(step, composed=composed)
        except (ConfigError, HydraException, OmegaConfBaseException, ValueError) as error:
            raise ConfigError(f"{step.identity}: {one_line(error)}") from None


def _check_step(step: Step, *, composed: Composed) -> None:
    config = check_command(step.verb, step.overrides, composed=composed)
    source = OmegaConf.select(config, "source.root") if step.verb == "pack" else None
    if source is not None and not Path(str(source)).exists() and not step.result.exists():
        raise ConfigError(f"source.root={source} does not exist")


def check_command(name: str, overrides: Sequence[str], *, composed: Composed | None = None) -> DictConfig:
    """Compose and check the command of a verb, as far as that needs neither data nor a run; return its config.

    Raises: ConfigError, ValueError, errors of Hydra.
    """
    package = name in ("train", "evaluate", "report", "export", "predict")
    verb = import_module(f"pipeline.{name}{'.__main__' if package else ''}").VERB
    complete = check_command_line(verb, overrides, composed=composed)
    config = compose(name, complete)
    check_config(config, complete, verb=verb)
    if verb.check_objects is not None:
        with fast_imports():
            verb.check_objects(config)
    return config
