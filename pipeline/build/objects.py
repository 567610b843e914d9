"""From a config node with a `_target_` to the object that it names."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from pipeline.cli.run import config_keys_in_errors, root_cause

Kind = TypeVar("Kind")


def build_object(config: DictConfig, key: str, *, kind: type[Kind], **given: object) -> Kind:
    """Build the object that the node at a dotted key names, with further arguments.

    Errors name config keys instead of the target's parameters.
    Raises: ValueError, OSError from the target; ValueError for unknown arguments or an object of another kind.
    """
    node = OmegaConf.select(config, key)
    names = list(map(str, node)) if isinstance(node, DictConfig) else []
    with config_keys_in_errors({name: f"{key}.{name}" for name in names}):
        try:
            # Hydra would convert dataclasses among its own arguments, so further ones are passed to a partial.
            built = instantiate(node, _convert_="all", **({"_partial_": True} if given else {}))
            built = built(**given) if given else built
        except (InstantiationException, TypeError) as error:
            cause = root_cause(error)
            raise (cause if isinstance(cause, ValueError | OSError) else ValueError(f"{key}: {cause}")) from error
    if not isinstance(built, kind):
        raise ValueError(f"{key}._target_={node._target_} returns {type(built).__name__}, not {kind.__name__}")
    return built


def read_config(path: Path, *, groups: Sequence[str] | None = None) -> DictConfig:
    """Read a config that a run has recorded, of all groups or some. Raises: ValueError when it is not one."""
    config = OmegaConf.load(path)
    if not isinstance(config, DictConfig):
        raise ValueError(f"{path} is not the config of a training")
    return config if groups is None else OmegaConf.masked_copy(config, list(groups))
