"""From the config that a run has recorded to its parts, for verbs that work on runs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch import nn

from data.shards.dataset import Dataset
from models.learning.recipe import Recipe
from pipeline.build.network import build_network, build_recipe, network_name
from pipeline.build.objects import build_object
from pipeline.cli.check import check_targets

# A run's folder may come from someone else, so fewer targets are trusted than on the command line.
TRUSTED = ("models.", "torch.nn.functional.", "torch.optim.", "torchvision.models.")


@dataclass(frozen=True)
class RecordedConfig:
    """The parts of a run's config; network, recipe and data set are built on demand.

    Images are squares of `image_size` pixels; `norm_eps` is None where the run kept the network's own.
    """

    network: str
    image_size: int
    in_channels: int
    batch_size: int
    norm_eps: float | None
    build_network: Callable[[], nn.Module]
    build_recipe: Callable[[], Recipe]
    open_dataset: Callable[[], Dataset]


def read_config(path: Path, *, trust: bool) -> RecordedConfig:
    """Read a recorded config; `trust` accepts any `_target_` in it.

    Raises: ValueError for another file; ConfigError for an untrusted target.
    """
    config = OmegaConf.load(path)
    if not isinstance(config, DictConfig):
        raise ValueError(f"{path} is not the config of a training")
    network = OmegaConf.masked_copy(config, ["model", "recipe"])
    if not trust:
        check_targets(network, trusted=TRUSTED)
    return RecordedConfig(
        network=network_name(config),
        image_size=config.data.image_size,
        in_channels=config.model.get("in_channels", 3),
        batch_size=config.data.batch_size,
        norm_eps=config.model.get("norm_eps"),
        build_network=partial(build_network, network),
        build_recipe=partial(build_recipe, network),
        open_dataset=partial(_open_dataset, config),
    )


def _open_dataset(config: DictConfig) -> Dataset:
    from pipeline.build.data import DataConfig  # with Lightning and DALI, which reports do not need

    return build_object(config, "data", kind=DataConfig).open_dataset()
