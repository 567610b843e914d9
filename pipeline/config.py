"""From a command line to a config that is right: what every verb does before it imports anything heavy.

Hydra composes; this file answers what Hydra answers with a traceback or not at all,
in one sentence with the nearest right word. A verb's file ends in

    if __name__ == "__main__":
        run_verb("train", main)
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONF = Path(__file__).resolve().parent.parent / "conf"
TRUSTED = ("models.", "data.", "pipeline.", "torch.", "torchvision.", "torchmetrics.", "pytorch_lightning.")


FLAGS_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--info", "-i")


class ConfigError(ValueError):
    """What is wrong with a command line, in a sentence."""


def run_verb(name: str, main: Callable[[DictConfig], None]) -> None:
    """Compose `conf/<name>.yaml` with the command line and call `main`; what a user can cause ends in exit code 1."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra prints three lines and exits by itself otherwise

    def guarded(config: DictConfig) -> None:  # inside Hydra, which prints a line of its own for what leaves it
        with failing_plainly():
            check_targets(config)
            main(config)

    with failing_plainly():
        sys.argv[1:] = check_command_line(name, sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(guarded)()


@contextmanager
def failing_plainly() -> Iterator[None]:
    """Turn what a user can cause into one line and exit code 1."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        fail(_root_cause(error) if isinstance(error, HydraException) else error)


def fail(error: BaseException | str) -> NoReturn:
    """Say what is wrong on one line of stderr and exit with 1."""
    text = " ".join(str(error).split())
    print(f"error: {text}", file=sys.stderr)
    raise SystemExit(1)


def check_command_line(name: str, arguments: list[str]) -> list[str]:
    """Check choices, keys and types of values of a verb's command line; return it, completed.

    Raises: ConfigError.
    """
    if any(flag in arguments for flag in ("--help", "-h", "--hydra-help", "--version")):
        return arguments
    words = [
        word
        for before, word in zip(["", *arguments], arguments, strict=False)
        if not word.startswith("-") and before not in FLAGS_WITH_VALUE
    ]
    overrides: list[Override] = OverridesParser.create().parse_overrides(words)
    if _names(overrides, "data.root") and not _names(overrides, "data", "experiment"):
        # The digits' crops fit nobody else's images: a root alone asks for the settings of any data set.
        arguments = [*arguments, "data=shards"]
        overrides += OverridesParser.create().parse_overrides(["data=shards"])
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    choices = [override for override in overrides if override.key_or_group in groups]
    for override in choices:
        _check_choice(override)
    base = compose(name, [override.input_line or "" for override in choices if not override.is_sweep_override()])
    if name == "train" and "model" not in base and not _names(overrides, "model", "experiment"):
        _check_keys(base, overrides, groups)
        raise ConfigError(f"no model: add +model=NAME, one of {', '.join(_options('model'))}")
    _check_keys(base, overrides, groups)
    missing = sorted(missing_keys(base) - {override.key_or_group for override in overrides})
    if missing:
        raise ConfigError(f"{missing[0]} has no default: add {missing[0]}=VALUE")
    return arguments


def compose(name: str, overrides: list[str]) -> DictConfig:
    """The config of a verb with these overrides, without starting it."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(name, overrides)


def check_targets(config: DictConfig) -> None:
    """Refuse a `_target_` from outside this project and the libraries it stands on, unless `trust=true`.

    A config file from a stranger is code: this stops the careless, not the determined.
    Raises: ConfigError.
    """
    if config.get("trust"):
        return
    for key, value in _targets(OmegaConf.to_container(config), ""):
        if not str(value).startswith(TRUSTED):
            raise ConfigError(f"{key}={value} is outside {', '.join(TRUSTED)}: add trust=true if you trust it")


def flatten(config: DictConfig) -> Iterator[tuple[str, Any]]:
    """Every value of a config by its dotted key, interpolations resolved; lists are values."""
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    yield from _leaves(plain, "")


def missing_keys(config: DictConfig) -> set[str]:
    """The keys that have no default and were not given."""
    return {key for key, value in _known_keys(config).items() if value == "???"}


def nearest(word: str, words: Iterable[str]) -> str:
    """The most similar of `words`, as a question for the end of a sentence; empty when nothing is near."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f": did you mean {found[0]}?" if found else ""


def _check_choice(override: Override) -> None:
    group = override.key_or_group
    options = _options(group)
    if override.is_delete() or override.is_sweep_override():
        return
    chosen = override.value()
    for choice in chosen if isinstance(chosen, list) else [chosen]:
        if str(choice) not in options:
            near = nearest(str(choice), options)
            raise ConfigError(f"{group}={choice} is not one of {', '.join(options)}{near}")
    if group == "model" and not override.is_add():
        raise ConfigError(f"model={chosen} needs a plus: +model={chosen}")


def _check_keys(base: DictConfig, overrides: list[Override], groups: set[str]) -> None:
    known = _known_keys(base)
    for override in overrides:
        key = override.key_or_group
        if key in groups or key.startswith("hydra."):
            continue
        parent = OmegaConf.select(base, key.rpartition(".")[0]) if "." in key else None
        takes_any = (
            isinstance(parent, DictConfig) and "_target_" in parent and (override.is_add() or override.is_force_add())
        )
        if key not in known and not takes_any:
            raise ConfigError(f"there is no {key}{nearest(key, {*known, *groups})}")
        if key in known and not override.is_delete() and not override.is_sweep_override():
            _check_type(key, override, known[key])


def _check_type(key: str, override: Override, default: object) -> None:
    value = override.value()
    kinds: dict[type, tuple[str, tuple[type, ...]]] = {
        bool: ("true or false", (bool,)),
        int: ("a whole number", (int,)),
        float: ("a number", (int, float)),
        list: ("a list", (list,)),
        dict: ("a group of keys", (dict,)),
    }
    if type(default) not in kinds:
        return
    wanted, allowed = kinds[type(default)]
    interpolated = isinstance(value, str) and "${" in value
    if not interpolated and (not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed)):
        raise ConfigError(f"{key}={override.get_value_string()} is not {wanted} (default {default})")


def _known_keys(config: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    known: dict[str, Any] = dict(_leaves(plain, ""))
    for key in list(known):
        parts = key.split(".")
        known.update({".".join(parts[:depth]): {} for depth in range(1, len(parts))})
    return known


def _targets(node: object, key: str) -> Iterator[tuple[str, object]]:
    if isinstance(node, dict):
        for name, value in node.items():
            if name == "_target_":
                yield f"{key}_target_", value
            yield from _targets(value, f"{key}{name}.")
    elif isinstance(node, list):
        for position, value in enumerate(node):
            yield from _targets(value, f"{key}{position}.")


def _leaves(node: dict[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _names(overrides: list[Override], *keys: str) -> bool:
    return any(override.key_or_group in keys for override in overrides)


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
