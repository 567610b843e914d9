"""Configs from `conf/`: compose them, list their groups and keys, flatten them."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from pipeline.cli.environment import guard_environment
from pipeline.cli.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"

# The keys that each group sets.
PARTS: Mapping[str, tuple[str, ...]] = {
    "recipe": (
        *("recipe.epochs", "recipe.accumulate", "recipe.clip_norm"),
        *("recipe.layer_decay", "recipe.head_warmup", "recipe.freeze"),
    ),
    "optimizer": ("recipe.optimizer", "recipe.base_lr", "recipe.base_batch_size", "recipe.lr_scaling"),
    "schedule": ("recipe.schedule", "recipe.warmup", "recipe.warmup_epochs", "recipe.warmup_steps"),
    "loss": ("recipe.loss",),
    "mix": ("recipe.mix",),
    "averaging": ("averaging",),
    "augment": ("augment.training", "augment.evaluation"),
    "fit": ("augment.fit", "augment.fill", "augment.evaluation.crop_fraction"),
    "policy": ("augment.policy",),
    "erasing": ("augment.erasing",),
}
PARTS_OF_RECIPE = ("optimizer", "schedule", "loss")

guard_environment()


def compose(verb: str, overrides: Sequence[str], *, with_hydra: bool = False) -> DictConfig:
    """Return the config `conf/<verb>.yaml` with these overrides, without running the verb.

    With `with_hydra` it has Hydra's own node `hydra`. Raises: ConfigError for trust that a YAML gives.
    """
    running = GlobalHydra.instance().hydra  # Hydra is a singleton, and is already initialised inside a verb
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            config = hydra.compose(verb, list(overrides), return_hydra_config=with_hydra)
    finally:
        GlobalHydra.instance().hydra = running
    check_trust(config, overrides)
    return config


@lru_cache
def replace_parts(verb: str, *choices: str) -> tuple[str, ...]:
    """Return overrides with which each chosen part has the values of its own file.

    `choices` are choices of groups as typed, such as `+experiment=timm_a2` and `mix=none`. Hydra would merge the
    experiment's values into whatever is chosen for a part.
    """
    chosen = {word.lstrip("+").partition("=")[0]: word for word in choices}
    parts = [*chosen, *(PARTS_OF_RECIPE if "recipe" in chosen else ())]
    if not PARTS.keys() & set(parts) or "experiment" not in chosen:
        return ()
    merged = compose(verb, choices, with_hydra=True)
    same = {group: f"{group}={merged.hydra.runtime.choices[group]}" for group in ("data", "augment")}
    alone = compose(verb, [word for group, word in {**same, **chosen}.items() if group != "experiment"])
    if "recipe" in chosen and alone.averaging:  # some recipes average weights
        parts.append("averaging")
    paths = dict.fromkeys(path for part in parts for path in PARTS.get(part, ()))
    if "averaging" in parts and (not alone.averaging or "recipe" in chosen):
        paths["choose_by"] = None
    nodes = ([_plain(OmegaConf.select(config, path)) for config in (merged, alone)] for path in paths)
    return tuple(word for path, (node, to) in zip(paths, nodes, strict=True) for word in _changes(path, node, to=to))


def _plain(node: object) -> object:
    return OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node


def _changes(path: str, node: object, *, to: object) -> Iterator[str]:
    """Yield overrides that turn a node into another one."""
    if isinstance(node, dict) and isinstance(to, dict):
        yield from (f"~{path}.{key}" for key in node if key not in to)
        for key, value in to.items():
            yield from _changes(f"{path}.{key}", node.get(key), to=value)
    elif node != to:
        yield f"++{path}={to if isinstance(to, str) else json.dumps(to)}"


def quote(text: str) -> str:
    """Return a text as a value that Hydra's grammar takes as it is."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), text)
    return f"'{escaped}'"


def check_trust(config: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse `trust` unless it is one of the overrides. Raises: ConfigError."""
    trust = config.get("trust")
    is_typed = any(re.fullmatch(r"\+{0,2}trust=true", word, re.IGNORECASE) for word in overrides)
    if trust not in (None, False) and not (trust is True and is_typed):
        raise ConfigError(f"trust={trust} in a YAML does not count: trust=true is for the command line")


def flatten(config: DictConfig) -> dict[str, Any]:
    """Return every value by its dotted key, with interpolations resolved; lists are values."""
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return dict(_leaves(plain, ""))


def known_keys(config: DictConfig) -> dict[str, Any]:
    """Return every dotted key with its default; inner nodes map to an empty dict."""
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    return {key: {} if isinstance(value, dict) else value for key, value in _nodes(plain, "")}


def verbs() -> list[str]:
    """Return the names of all verbs."""
    return sorted(path.stem for path in CONF.glob("*.yaml"))


@lru_cache
def groups() -> set[str]:
    """Return the names of all config groups."""
    return {path.name for path in CONF.iterdir() if path.is_dir()}


def choices(group: str) -> list[str]:
    """Return the names of a group's configs."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@lru_cache
def default_groups(verb: str) -> set[str]:
    """Return the groups in a verb's defaults list."""
    defaults = OmegaConf.select(OmegaConf.load(CONF / f"{verb}.yaml"), "defaults")
    listed = {str(group) for entry in defaults if isinstance(entry, DictConfig) for group in entry}
    return listed & groups()


def _nodes(node: dict[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _nodes(value, f"{prefix}{key}.")


def _leaves(node: dict[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
