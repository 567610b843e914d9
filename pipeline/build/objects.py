"""From a config node with a `_target_` to the object that it names.

Nodes follow Hydra's conventions: `_target_` is a class or a function, `_partial_: true` leaves it uncalled. Hydra's
own `instantiate` would call any name that can be imported.
"""

import inspect
import pkgutil
import sys
import typing
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from models.arguments import ArgumentError
from pipeline.cli.compose import known_keys
from pipeline.cli.errors import ConfigError, config_keys_in_errors, nearest
from pipeline.cli.targets import ADVICE, check_node, group_of, is_ours

Kind = TypeVar("Kind")


def build_object(config: DictConfig, key: str, *, kind: type[Kind], **given: object) -> Kind:
    """Build the object that the node at a dotted key names, with further arguments.

    Without `trust` in the config, nothing is called that is not in a place of its key and of the right kind. Errors
    name config keys instead of the target's parameters.
    Raises: ValueError, OSError from the target; ValueError for unknown arguments or an object of another kind;
    ConfigError for a target that needs trust.
    """
    node, trusted = OmegaConf.select(config, key), bool(config.get("trust"))
    if not OmegaConf.is_config(node):
        raise ArgumentError((key, node), " is no group of keys")
    plain: Any = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    if not trusted:
        check_node(plain, key)  # with interpolations resolved
    with config_keys_in_errors(_keys_in(node, key) if isinstance(node, DictConfig) else {}):
        built = _build(plain, key, trusted=trusted, given=given)
    if not isinstance(built, kind):
        named = (f"{key}._target_", plain["_target_"]) if "_target_" in plain else (key, plain)
        raise ArgumentError(named, f" returns {type(built).__name__}, not {kind.__name__}")
    return built


def _build(plain: object, key: str, *, trusted: bool, given: dict[str, object] | None = None) -> object:
    """Build a plain value with everything in it; `given` are further arguments of its target."""
    if isinstance(plain, list):
        return [_build(value, f"{key}.{number}", trusted=trusted) for number, value in enumerate(plain)]
    if not isinstance(plain, dict):
        return plain
    target = find_target(str(plain["_target_"]), key, trusted=trusted) if "_target_" in plain else dict
    given = given or {}
    own = [name for name in plain if name not in ("_target_", "_partial_", *given)]
    values = {name: _build(plain[name], f"{key}.{name}", trusted=trusted) for name in own}
    if plain.get("_partial_") and not given:
        return partial(target, **values)
    expected = TypeError if given else Exception  # errors of objects that are passed on are not the config's
    try:
        return target(**values, **given)
    except (ValueError, OSError):
        raise
    except expected as error:
        raise ValueError(f"{key}: {error}") from error


def find_target(name: str, key: str, *, trusted: bool) -> Callable[..., object]:
    """Import the target of the node at a dotted key, whose place has been checked.

    Raises: ConfigError, unless `trusted`, when it is not defined in that place or of another kind than its key takes;
    ValueError when there is no such name.
    """
    try:
        found: Any = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        problem = _missing_library(error, key=key) or f" does not exist: {error}{_nearest(name)}"
        raise ArgumentError((f"{key}._target_", name), problem) from error
    if not trusted:
        _check_kind(found, name, key=key)
    if not callable(found):
        raise ArgumentError((f"{key}._target_", name), " is neither a class nor a function")
    return typing.cast(Callable[..., object], found)


def _missing_library(error: Exception, *, key: str) -> str | None:
    """Return how to install the library whose absence is the error, None unless it is one that the key names."""
    group = group_of(key)
    libraries = {place.partition(".")[0] for place in group.places} if group else set()
    if not isinstance(error, ModuleNotFoundError) or error.name not in libraries:
        return None
    return f" needs {error.name}, which is not installed: python -m pip install {error.name}"


def _nearest(target: str) -> str:
    module, _, name = target.rpartition(".")
    found = sys.modules.get(module)
    return nearest(name, [other for other in vars(found) if not other.startswith("_")]) if found else ""


def _check_kind(found: object, name: str, *, key: str) -> None:
    """Refuse what is only imported into its place, and what the key does not take. Raises: ConfigError."""
    group, module = group_of(key), name.rpartition(".")[0]
    assert group is not None
    kinds = [pkgutil.resolve_name(kind) for kind in group.kinds]
    is_class = inspect.isclass(found)
    is_kind = any(_is_a(found if is_class else _returned_type(found), kind) for kind in kinds)
    origin = str(getattr(found, "__module__", ""))
    # Libraries offer their classes in another module than that which defines them.
    is_defined_there = origin == module if is_ours(name) else is_class or f"{origin}.".startswith(f"{module}.")
    if not (is_kind and is_defined_there):
        names = " or ".join(kind.__name__ for kind in kinds)
        rule = f"a class of {names} defined in {module}, or a function annotated to return one"
        raise ConfigError(f"{key}._target_={name} is not {rule}: {ADVICE}")


def _returned_type(function: object) -> object:
    """Return the annotated result of a function, None for anything else."""
    inner = inspect.unwrap(function) if inspect.isfunction(function) else None
    if not inspect.isfunction(inner):
        return None
    returned = SimpleNamespace(__annotations__={"return": inspect.get_annotations(inner).get("return")})
    try:
        return typing.get_type_hints(returned, inner.__globals__).get("return")
    except NameError:  # an import for type checkers only
        return None


def _is_a(found: object, kind: type) -> bool:
    """Return whether a class is a subclass, or has the methods of a protocol."""
    if not inspect.isclass(found):
        return False
    if not getattr(kind, "_is_protocol", False):
        return issubclass(found, kind)
    methods = [name for name, value in vars(kind).items() if inspect.isfunction(value) and not name.startswith("_")]
    return all(callable(getattr(found, name, None)) for name in methods)


def _keys_in(node: DictConfig, key: str) -> dict[str, str]:
    """Map the arguments of a node and of those inside it to the keys that set them, through interpolations."""
    keys = {}
    for name, value in known_keys(node).items():
        refers = isinstance(value, str) and value.startswith("${") and value.endswith("}")
        keys[name] = str(value)[2:-1] if refers else f"{key}.{name}"
        keys.setdefault(name.rpartition(".")[2], keys[name])  # as the node inside names it
    return keys
