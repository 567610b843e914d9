"""Checks of a study's commands, before any of them runs."""

from collections.abc import Sequence
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.shards.indexing import find_tars
from data.shards.parallel import available_cores, map_tasks
from data.storage.location import parse_root
from pipeline.cli.check import Composed
from pipeline.cli.errors import ConfigError, one_line
from pipeline.cli.run import fast_imports
from pipeline.engines.commands import check_command, find_verb
from pipeline.engines.study import Step

STEPS_OF_A_TASK = 20


def check_commands(steps: Sequence[Step]) -> None:
    """Compose and check the command of each step, on all cores. Raises: ConfigError, with the step's name."""
    different = _drop_equal_commands(steps)
    tasks = [different[start : start + STEPS_OF_A_TASK] for start in range(0, len(different), STEPS_OF_A_TASK)]
    sizes = [len(task) for task in tasks]
    map_tasks(_check_steps, tasks, sizes=sizes, workers=available_cores(), label="checking", unit="commands")


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
    verb = find_verb(step.verb)
    config = check_command(verb, step.overrides, composed=composed)
    if verb.check_objects is not None:
        with fast_imports():
            verb.check_objects(config)
    is_made = any(one.startswith("train/") for one in step.needs)  # the weights, by this study
    for key in ("source.root", "weights.file"):
        file, has_begun = OmegaConf.select(config, key), step.result.parent.exists()
        if file is not None and not has_begun and not is_made and not Path(str(file)).exists():
            raise ConfigError(f"{key}={file} does not exist")
