"""A command of a verb, checked by another program before it starts it."""

from collections.abc import Sequence
from importlib import import_module

from omegaconf import DictConfig

from pipeline.cli.check import Composed, check_command_line
from pipeline.cli.compose import compose
from pipeline.cli.run import check_config
from pipeline.cli.verb import Verb


def find_verb(name: str) -> Verb:
    """Return the rules of `pipeline.NAME`. Raises: ImportError where there is no such verb."""
    module = import_module(f"pipeline.{name}")
    verb = import_module(f"{module.__name__}.__main__").VERB if hasattr(module, "__path__") else module.VERB
    assert isinstance(verb, Verb)
    return verb


def check_command(verb: Verb, overrides: Sequence[str], *, composed: Composed | None = None) -> DictConfig:
    """Compose and check a command of a verb, without its data; return its config.

    Raises: ConfigError, ValueError, errors of Hydra.
    """
    complete = check_command_line(verb, overrides, composed=composed)
    config = compose(verb.name, complete)
    check_config(config, complete, verb=verb)
    return config
