"""From a config node with a `_target_` to the object that it names."""

from typing import TypeVar

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from models.arguments import ArgumentError
from pipeline.cli.compose import known_keys
from pipeline.cli.errors import config_keys_in_errors, root_cause

Kind = TypeVar("Kind")


def build_object(config: DictConfig, key: str, *, kind: type[Kind], **given: object) -> Kind:
    """Build the object that the node at a dotted key names, with further arguments.

    Errors name config keys instead of the target's parameters.
    Raises: ValueError, OSError from the target; ValueError for unknown arguments or an object of another kind.
    """
    node = OmegaConf.select(config, key)
    with config_keys_in_errors(_keys_in(node, key) if isinstance(node, DictConfig) else {}):
        try:
            # Hydra would convert dataclasses among its own arguments, so further ones are passed to a partial.
            built = instantiate(node, _convert_="all", **({"_partial_": True} if given else {}))
            built = built(**given) if given else built
        except (InstantiationException, TypeError) as error:
            cause = root_cause(error)
            if isinstance(cause, ValueError | OSError):
                raise cause from None  # `from error` would make a cycle of causes
            raise ValueError(f"{key}: {cause}") from error
    if not isinstance(built, kind):
        returned = f" returns {type(built).__name__}, not {kind.__name__}"
        raise ArgumentError((f"{key}._target_", node._target_), returned)
    return built


def _keys_in(node: DictConfig, key: str) -> dict[str, str]:
    """Map the arguments of a node and of those inside it to the keys that set them, through interpolations."""
    keys = {}
    for name, value in known_keys(node).items():
        refers = isinstance(value, str) and value.startswith("${") and value.endswith("}")
        keys[name] = str(value)[2:-1] if refers else f"{key}.{name}"
        keys.setdefault(name.rpartition(".")[2], keys[name])  # as the node inside names it
    return keys
