"""From the config that a run has recorded to its parts, for verbs that work on runs."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch import nn

from data.shards.dataset import Dataset
from models.learning.recipe import Recipe
from pipeline.build.network import build_network, build_recipe, network_name
from pipeline.build.objects import build_object
from pipeline.cli.check import check_targets

# A run's folder may come from someone else, so fewer targets are trusted than on the command line.
TRUSTED = ("models.", "pipeline.build.data.", "torch.nn.functional.", "torch.optim.", "torchvision.models.")


class RecordedConfig:
    """The config that a run has recorded; network, recipe and data set are built on demand.

    `trust` accepts any `_target_` in it. Images are squares of `image_size` pixels; `norm_eps` is None where the run
    kept the network's own. Raises: ValueError for another file; ConfigError for an untrusted target.
    """

    def __init__(self, path: Path, *, trust: bool) -> None:
        config = OmegaConf.load(path)
        if not isinstance(config, DictConfig):
            raise ValueError(f"{path} is not the config of a training")
        self._config = OmegaConf.masked_copy(config, ["model", "recipe", "data"])
        if not trust:
            check_targets(self._config, trusted=TRUSTED)
        self.network = network_name(config)
        self.image_size: int = config.data.image_size
        self.in_channels: int = config.model.get("in_channels", 3)
        self.batch_size: int = config.data.batch_size
        self.norm_eps: float | None = config.model.get("norm_eps")

    def build_network(self) -> nn.Module:
        """Build the network, without the run's weights. Raises: ValueError."""
        return build_network(self._config)

    def build_recipe(self) -> Recipe:
        """Build the recipe. Raises: ValueError."""
        return build_recipe(self._config)

    def open_dataset(self) -> Dataset:
        """Open the data set. Raises: FileNotFoundError, ValueError."""
        from pipeline.build.data import DataConfig  # with Lightning and DALI, which reports do not need

        return build_object(self._config, "data", kind=DataConfig).open_dataset()
