"""Which classes and functions the `_target_`s of a config may name, by the key at which they stand.

Nothing is imported here, so that a refusal comes at once. `pipeline/build/objects.py` checks what needs an import.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from pipeline.cli.compose import ROOT
from pipeline.cli.errors import ConfigError

OURS = ("models", "data", "pipeline")
ADVICE = "add trust=true to the command if you trust it"
SPECIAL = re.compile(r"_[a-z]+_")  # Hydra's keys
# torchvision's arguments that download a file and unpickle it.
DOWNLOADS = ("weights", "pretrained")
BOOLEANS = (True, False)


class Group(NamedTuple):
    """The targets of a key and of those inside it.

    A place of this project stands for all modules in it, another one for itself. A target is one name in a module: a
    class of one of the `kinds`, or a function that is annotated to return one.
    """

    places: tuple[str, ...]
    kinds: tuple[str, ...]


_PARTS_OF_TRAINER = Group(
    (
        *("pytorch_lightning.strategies", "pytorch_lightning.profilers", "pytorch_lightning.plugins"),
        *(
            "pytorch_lightning.plugins.precision",
            "pytorch_lightning.plugins.environments",
            "models",
            "pipeline.train.callbacks",
        ),
    ),
    (
        *("pytorch_lightning.strategies.Strategy", "pytorch_lightning.profilers.Profiler"),
        *("pytorch_lightning.plugins.Precision", "pytorch_lightning.plugins.LayerSync"),
        "pytorch_lightning.plugins.ClusterEnvironment",
    ),
)
GROUPS = {
    "model": Group(("models", "torchvision.models", "torch.nn"), ("torch.nn.Module",)),
    "classifier": Group(("models",), ("models.learning.classifier.Classifier",)),
    "averaging": Group(("models.learning",), ("models.learning.averaging.Averaging",)),
    "recipe": Group(("models.learning",), ("models.learning.recipe.Recipe",)),
    "recipe.optimizer": Group(("models", "torch.optim", "timm.optim", "schedulefree"), ("torch.optim.Optimizer",)),
    "recipe.schedule": Group(("models",), ("builtins.float",)),
    "recipe.loss": Group(("models", "torch.nn", "torch.nn.functional"), ("torch.Tensor", "torch.nn.Module")),
    "recipe.mix": Group(("models.learning",), ("models.learning.mixing.Mixing",)),
    "augment": Group(("data.augment", "data.loading"), ("data.augment.crops.CropPolicy",)),
    "augment.policy": Group(("data.augment",), ("data.augment.policies.Policy",)),
    "augment.erasing": Group(("data.augment",), ("data.augment.erasing.RandomErasing",)),
    "data": Group(("pipeline.build.data",), ("pipeline.build.data.DataConfig",)),
    "weights": Group(("pipeline.build.weights",), ("pipeline.build.weights.WeightsFile",)),
    "tracking": Group(("pipeline.tracking",), ("pipeline.tracking.tracker.Tracker",)),
    "callbacks": Group(
        ("models", "pipeline.train.callbacks", "pytorch_lightning.callbacks"), ("pytorch_lightning.callbacks.Callback",)
    ),
    "trainer": Group(("pytorch_lightning",), ("pytorch_lightning.Trainer",)),
    "trainer.plugins": _PARTS_OF_TRAINER,
    "trainer.strategy": _PARTS_OF_TRAINER,
    "trainer.profiler": _PARTS_OF_TRAINER,
    "source": Group(("data.shards",), ("data.shards.sources.Source",)),
}


def check_targets(config: DictConfig) -> None:
    """Refuse a `_target_` that is not in a place of its key, unless `trust` is true. Raises: ConfigError."""
    if not config.get("trust"):
        check_node(OmegaConf.to_container(config), "")


def check_node(node: object, key: str) -> None:
    """Refuse a `_target_` in a plain value, which stands at a dotted key. Raises: ConfigError."""
    for inner, values in _nodes(node, key):
        if "_target_" in values:
            check_place(inner, values["_target_"])
        is_torchvisions = str(values.get("_target_")).startswith("torchvision.models.")
        for name, value in values.items():
            where = f"{inner}.{name}" if inner else str(name)
            if SPECIAL.fullmatch(str(name)) and name != "_target_" and not (name == "_partial_" and value in BOOLEANS):
                raise ConfigError(f"{where}={value} is not supported: a node has a _target_, a _partial_ and arguments")
            if is_torchvisions and str(name).startswith(DOWNLOADS) and value:
                raise ConfigError(f"{where}={value} would download and unpickle a file: add weights=FILE instead")


def group_of(key: str) -> Group | None:
    """Return the group with the longest key that is this one, or above it."""
    above = [name for name in GROUPS if f"{key}.".startswith(f"{name}.")]
    return GROUPS[max(above, key=len)] if above else None


def check_place(key: str, target: object) -> None:
    """Refuse a target that is not one name in a place of the group of its key. Raises: ConfigError."""
    group, text = group_of(key), str(target)
    if group is None:
        raise ConfigError(f"{key}._target_={text} is at a key that builds nothing: remove it".removeprefix("."))
    if not any(_is_in(text, place) for place in group.places):
        raise ConfigError(f"{key}._target_={text} is outside {', '.join(group.places)}: {ADVICE}")


def is_ours(target: str) -> bool:
    """Return whether a target is in a package of this project."""
    return target.partition(".")[0] in OURS


def _is_in(target: str, place: str) -> bool:
    module, _, name = target.rpartition(".")
    if not all(part.isidentifier() for part in target.split(".")) or name.startswith("_"):
        return False
    if not is_ours(place):
        return module == place
    file = ROOT.joinpath(*module.split("."))
    is_file = file.with_suffix(".py").is_file() or (file / "__init__.py").is_file()
    return f"{module}.".startswith(f"{place}.") and is_file


def _nodes(node: object, key: str) -> Iterator[tuple[str, Mapping[Any, object]]]:
    """Yield every mapping in a plain value, with its dotted key."""
    if isinstance(node, dict):
        yield key, node
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in items:
        yield from _nodes(value, f"{key}.{name}" if key else str(name))
