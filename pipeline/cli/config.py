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
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONF = Path(__file__).resolve().parents[2] / "conf"
TRUSTED = ("models.", "data.", "pipeline.", "torch.", "torchvision.", "torchmetrics.", "pytorch_lightning.")


# Verbs that need a choice which their defaults must not make.
REQUIRED = {"train": "model", "report": "model"}
# What may stand in its place.
INSTEAD = {"report": ("models", "run", "net"), "train": ("experiment",)}
# A value, the groups that could have set it, and the choice that it means when none of them is made.
IMPLIED = {"data.root": (("data", "experiment"), "data=shards")}
# What may be typed for a key that is set most.
SHORT = {"weights": "weights.file"}
TEXTS = ("weights.file", "weights.sha256")  # whatever they look like
# Hydra's own.
FLAGS = ("--cfg", "-c", "--resolve", "--package", "-p", "--info", "-i", "--multirun", "-m", "--run", "-r")
FLAGS_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--info", "-i")
FLAGS_ALONE = ("--help", "-h", "--hydra-help", "--version")


class ConfigError(ValueError):
    """What is wrong with a command line, in a sentence."""


def run_verb(name: str, main: Callable[[DictConfig], None]) -> None:
    """Compose `conf/<name>.yaml` with the command line and call `main`; what a user can cause ends in exit code 1."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra prints three lines and exits by itself otherwise

    def guarded(config: DictConfig) -> None:  # inside Hydra, which prints a line of its own for what leaves it
        with failing_plainly():
            check_targets(config)
            main(config)

    OmegaConf.register_new_resolver("choices", _choices, replace=True)
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
    """Check flags, choices, keys and types of values of a verb's command line; return it, completed.

    Raises: ConfigError.
    """
    short = _words(arguments)
    words = [_lengthen(word) for word in short]
    arguments = [*(word for word in arguments if word not in short), *words]  # Hydra takes no flag between overrides
    if any(flag in arguments for flag in FLAGS_ALONE):
        return arguments
    overrides = _parse(words)
    for key, (groups, choice) in IMPLIED.items():
        if _names(overrides, key) and not _names(overrides, *groups):
            arguments, overrides = [*arguments, choice], [*overrides, *_parse([choice])]
    choices = [override for override in overrides if override.key_or_group in _groups()]
    for override in choices:
        _check_choice(name, override)
    base = compose(name, [_first(override) for override in choices])
    group = REQUIRED.get(name)
    if group is not None and group not in base and not _names(overrides, group, *INSTEAD[name]):
        _check_keys(base, [override for override in overrides if not override.key_or_group.startswith(f"{group}.")])
        raise ConfigError(f"no {group}: add +{group}=NAME, one of {', '.join(_options(group))}")
    _check_keys(base, overrides)
    missing = sorted(missing_keys(base) - {override.key_or_group for override in overrides})
    if missing:
        raise ConfigError(f"{missing[0]} has no default: add {missing[0]}=VALUE")
    return arguments


def compose(name: str, overrides: list[str]) -> DictConfig:
    """The config of a verb with these overrides, without starting it."""
    running = GlobalHydra.instance().hydra  # inside a verb Hydra is at work, and begins nothing else meanwhile
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose(name, overrides)
    finally:
        GlobalHydra.instance().hydra = running


def check_targets(config: DictConfig, *, among: tuple[str, ...] = TRUSTED) -> None:
    """Refuse a `_target_` from outside this project and the libraries it stands on, unless `trust=true`.

    A config file from a stranger is code: this stops the careless, not the determined.
    Raises: ConfigError.
    """
    if config.get("trust"):
        return
    for key, value in _targets(OmegaConf.to_container(config), ""):
        if not str(value).startswith(among):
            raise ConfigError(f"{key}={value} is outside {', '.join(among)}: add trust=true if you trust it")


def flatten(config: DictConfig) -> dict[str, Any]:
    """Every value of a config by its dotted key, interpolations resolved; lists are values."""
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return dict(_leaves(plain, ""))


def missing_keys(config: DictConfig) -> set[str]:
    """The keys that have no default and were not given."""
    return {key for key, value in _known_keys(config).items() if value == "???"}


def nearest(word: str, words: Iterable[str], *, cutoff: float = 0.5) -> str:
    """The most similar of `words`, as a question for the end of a sentence; empty when nothing is near."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=cutoff)
    return f": did you mean {found[0]}?" if found else ""


def _words(arguments: list[str]) -> list[str]:
    """What is no flag of Hydra's and no value of one."""
    for word in arguments:
        if word.startswith("-") and word not in (*FLAGS, *FLAGS_ALONE):
            raise ConfigError(f"there is no flag {word}: values are set by KEY=VALUE without dashes, --help lists them")
    pairs = zip(["", *arguments], arguments, strict=False)
    return [word for before, word in pairs if not word.startswith("-") and before not in FLAGS_WITH_VALUE]


def _lengthen(word: str) -> str:
    """The word with the whole key, and quotes around a text that Hydra would take for something else, or not at all."""
    key, equals, value = word.partition("=")
    if not equals or key not in (*SHORT, *TEXTS) or value[:1] in ("{", "["):
        return word
    bare = value in ("", "null") or value[0] in "'\"" or "," in value  # a sweep has commas
    quoted = value if bare else "'{}'".format(value.replace("'", "\\'"))
    return f"{SHORT.get(key, key)}={quoted}"


def _parse(words: list[str]) -> list[Override]:
    overrides: list[Override] = OverridesParser.create().parse_overrides(words)
    return overrides


def _groups() -> set[str]:
    return {path.name for path in CONF.iterdir() if path.is_dir()}


def _check_choice(verb: str, override: Override) -> None:
    group = override.key_or_group
    if override.is_delete():
        return
    own = {path.stem for path in CONF.glob("*.yaml")}
    if group not in _groups_of(verb):
        others = [other for other in sorted(own) if group in _groups_of(other)]
        raise ConfigError(f"{verb} has no {group} to choose, {' and '.join(others) or 'no verb'} has")
    options, chosen = _options(group), override.value()
    if override.is_sweep_override():
        choices: list[object] = list(override.sweep_string_iterator())
    else:
        choices = [*chosen] if isinstance(chosen, list) else [chosen]
    for choice in choices:
        if str(choice) not in options:
            near = nearest(str(choice), options)
            raise ConfigError(f"{group}={choice} is not one of {', '.join(options)}{near}")
    if group in REQUIRED.values() and not override.is_add():
        raise ConfigError(f"{group}={chosen} needs a plus: +{group}={chosen}")


def _groups_of(verb: str) -> set[str]:
    """The groups of which a verb's config takes a choice."""
    defaults = OmegaConf.select(OmegaConf.load(CONF / f"{verb}.yaml"), "defaults")
    made = {str(group) for entry in defaults if isinstance(entry, DictConfig) for group in entry}
    added = {REQUIRED[verb], *INSTEAD[verb]} if verb in REQUIRED else set()
    return (made | added) & _groups()


def _choices(verb: str) -> str:
    """What a verb takes choices of, a line a group: for its help."""
    plus = {REQUIRED[verb], *INSTEAD[verb]} if verb in REQUIRED else set()
    groups = sorted(_groups_of(verb), key=lambda group: (group not in plus, group not in REQUIRED.values(), group))
    return "\n".join(f"  {'+' * (group in plus)}{group}= {', '.join(_options(group))}" for group in groups)


def _check_keys(base: DictConfig, overrides: list[Override]) -> None:
    known, groups = _known_keys(base), _groups()
    for override in overrides:
        key = override.key_or_group
        if key in groups or key.startswith(("hydra.", "hydra/")):
            continue
        if key not in known and not _may_be_added(override, base):
            if _may_be_added(override, base, plus=True):
                node = OmegaConf.select(base, key.rpartition(".")[0])
                raise ConfigError(f"there is no {key} in this config: +{key}=VALUE hands it to {node._target_}")
            same_end = {name for name in known if name.rpartition(".")[2] == key}  # lr for recipe.optimizer.lr
            raise ConfigError(f"there is no {key}{nearest(key, {*known, *groups}) or nearest(key, same_end, cutoff=0)}")
        if key in known and not override.is_delete() and not override.is_sweep_override():
            _check_type(override, known[key])


def _may_be_added(override: Override, base: DictConfig, *, plus: bool = False) -> bool:
    """Whether a key is new to a node that names a `_target_`, and no slip of the pen; `plus` as if typed with one."""
    parent, _, name = override.key_or_group.rpartition(".")
    node = OmegaConf.select(base, parent) if parent else None
    if not isinstance(node, DictConfig) or "_target_" not in node:
        return False
    slip = difflib.get_close_matches(name, [str(key) for key in node], n=1, cutoff=0.85)
    return not slip and (plus or override.is_add() or override.is_force_add())


def _first(override: Override) -> str:
    """The override as it was typed, of a sweep the first."""
    if not override.is_sweep_override():
        return override.input_line or ""
    return f"{'+' if override.is_add() else ''}{override.key_or_group}={next(iter(override.sweep_string_iterator()))}"


def _check_type(override: Override, default: object) -> None:
    key, value = override.key_or_group, override.value()
    kinds: dict[type, tuple[str, tuple[type, ...]]] = {
        bool: ("true or false", (bool,)),
        int: ("a whole number", (int,)),
        float: ("a number", (int, float)),
        list: ("a list", (list,)),
        dict: ("a group of keys", (dict,)),
        str: ("a text", (str, int, float, list)),
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
