"""From the config that a run has recorded to its parts, for verbs that work on runs."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from omegaconf import OmegaConf
from torch import nn

from data.augment.crops import CropPolicy, ImageSize
from data.shards.dataset import Dataset
from data.storage.local import Storage
from data.storage.location import parse_root
from models.learning.recipe import Recipe
from pipeline.build.augmentation import build_augmentation, build_evaluation_crop
from pipeline.build.network import build_network, build_recipe, network_name
from pipeline.build.objects import build_object
from pipeline.build.parameters import load_record
from pipeline.cli.environment import check_server
from pipeline.cli.errors import ConfigError
from pipeline.cli.secrets import MASK, mask_address
from pipeline.cli.targets import ADVICE, check_targets

Built = TypeVar("Built")

PARTS = ["model", "recipe", "data", "augment", "dataset", "tracking"]


class DatasetFacts(NamedTuple):
    """What a run records of its data set: enough to prepare images and to name classes without it."""

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classes: tuple[str, ...]


class RecordedConfig:
    """The config that a run has recorded; network, recipe and data set are built on demand.

    `trust` accepts any `_target_` in it. Images have `image_size` pixels; `norm_eps` is None where the run
    kept the network's own. Raises: ValueError for another file; ConfigError for an untrusted target.
    """

    def __init__(self, path: Path, *, trust: bool) -> None:
        config = load_record(path)
        if not trust and config.get("trust"):
            raise ConfigError(f"{path} has trust={config.trust}, which does not count there: {ADVICE}")
        self._config = OmegaConf.masked_copy(config, PARTS)
        self._config.trust = trust
        check_targets(self._config)
        self.network = network_name(config)
        self.image_size: ImageSize = config.data.image_size
        self.num_classes: int = config.model.num_classes
        self.in_channels: int = config.model.get("in_channels", 3)
        self.batch_size: int = config.data.batch_size
        self.norm_eps: float | None = config.model.get("norm_eps")
        self.data_root = parse_root(str(config.data.root))

    def build_network(self) -> nn.Module:
        """Build the network, without the run's weights. Raises: ValueError."""
        return build_network(self._config)

    def values(self, key: str) -> dict[str, object]:
        """Return the values that it records under a dotted key, such as `model` or `augment.evaluation`."""
        found = OmegaConf.to_container(OmegaConf.select(self._config, key), resolve=True)
        return {str(name): value for name, value in found.items()} if isinstance(found, dict) else {}

    def build_recipe(self) -> Recipe:
        """Build the recipe. Raises: ValueError."""
        return build_recipe(self._config)

    def build_training_crop(self) -> CropPolicy:
        """Build the crop with which it trains. Raises: ValueError."""
        return build_augmentation(self._config).crop

    def build_evaluation_crop(self) -> CropPolicy:
        """Build the crop with which it evaluates. Raises: ValueError."""
        return build_evaluation_crop(self._config)

    def dataset_facts(self) -> DatasetFacts:
        """Return what the run records of its data set; a run from before that opens it.

        Raises: FileNotFoundError, ValueError.
        """
        if self._config.get("dataset") is None:
            dataset = self.open_dataset()
            return DatasetFacts(dataset.name, dataset.mean, dataset.std, tuple(dataset.classes))
        recorded: Any = OmegaConf.to_container(self._config.dataset, resolve=False)  # a class may be named ${x}
        mean, std = tuple(recorded["mean"]), tuple(recorded["std"])
        return DatasetFacts(str(recorded["name"]), mean, std, tuple(map(str, recorded["classes"])))

    def build_tracking(self, kind: type[Built]) -> Built | None:
        """Build the tracking of the run, None for a run without a dashboard.

        A password in the address is not recorded: MLFLOW_TRACKING_URI has to be the same address with it.
        Raises: ValueError where it is another one; ConfigError for a server that would be sent credentials.
        """
        tracking = self._config.get("tracking")
        if not tracking:
            return None
        uri, current = str(tracking.get("uri")), os.environ.get("MLFLOW_TRACKING_URI", "")
        if MASK in uri:
            if mask_address(current) != uri:
                raise ValueError(f"tracking.uri={uri} is recorded without its password: set MLFLOW_TRACKING_URI")
            tracking.uri = None  # the tracker reads the variable
        elif not self._config.trust:
            check_server(tracking.get("uri"))
        return build_object(self._config, "tracking", kind=kind)

    def open_dataset(self) -> Dataset:
        """Open the data set. Raises: FileNotFoundError, ValueError."""
        from pipeline.build.data import DataConfig  # with Lightning and DALI, which reports do not need

        return build_object(self._config, "data", kind=DataConfig).open_dataset()

    def open_storage(self, dataset: Dataset) -> Storage:
        """Return the storage of a data set, with the settings of the run. Raises: ValueError, OSError.

        Its cache is used only where the folder exists: another machine may have no such disk.
        """
        from pipeline.build.data import DataConfig

        data = build_object(self._config, "data", kind=DataConfig)
        if data.cache is not None and not Path(str(data.cache)).is_dir():
            data = replace(data, cache=None)
        return data.open_storage(dataset)
