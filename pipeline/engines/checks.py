"""Checks of a study's commands, before any of them runs."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.shards.indexing import find_tars
from data.shards.parallel import available_cores, map_tasks
from data.storage.location import parse_root
from pipeline.cli.check import Composed, check_command_line
from pipeline.cli.compose import compose
from pipeline.cli.errors import ConfigError, one_line
from pipeline.cli.run import check_config
from pipeline.engines.study import Step

STEPS_OF_A_TASK = 20  # which take as long as the start of a process


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
    package = step.verb in ("train", "evaluate", "report", "export", "predict")
    verb = import_module(f"pipeline.{step.verb}{'.__main__' if package else ''}").VERB
    complete = check_command_line(verb, step.overrides, composed=composed)
    config = compose(step.verb, complete)
    check_config(config, complete, verb=verb)
    source = OmegaConf.select(config, "source.root") if step.verb == "pack" else None
    if source is not None and not Path(str(source)).exists() and not step.result.exists():
        raise ConfigError(f"source.root={source} does not exist")
