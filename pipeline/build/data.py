"""From `conf/data` to an open data set and its loaders."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from data.augment.crops import ImageSize
from data.loading.datamodule import LoaderSettings, ShardData
from data.shards.dataset import Dataset
from data.shards.remote_index import load_versions
from data.storage.local import Storage
from data.storage.location import Root, local_folder, parse_root
from data.storage.open import CACHE_GIGABYTES, StorageSettings, open_storage
from data.storage.remote import INFLIGHT
from pipeline.build.augmentation import build_augmentation, build_evaluation_crop
from pipeline.build.first_rank import open_on_first_rank
from pipeline.build.objects import build_object
from pipeline.build.source import open_tars, pack_once
from pipeline.cli.errors import config_keys_in_errors

LOADER_OPTIONS = (
    "batch_size", "shuffle_window", "readahead", "threads", "io_threads", "prefetch", "decoder", "hw_decoder_load",
)  # fmt: skip
STORAGE_KEYS = {"inflight": "data.inflight", "folder": "data.cache", "gigabytes": "data.cache_gb", "root": "data.root"}
LOADER_KEYS = {name: f"data.{name}" for name in LOADER_OPTIONS} | {"accumulate": "recipe.accumulate"}
DATASET_KEYS = {"root": "data.root", "folder": "data.index", "label_field": "data.label_field"}


@dataclass(frozen=True)
class DataConfig:
    """The values of `conf/data`: where the shards lie, and how a rank reads them.

    `root` is a folder or the URL of one in an object store, which `inflight`, `cache` and `cache_gb` are for.
    `image_size` is for the crops and the network, which refer to it.
    """

    root: str
    image_size: ImageSize
    batch_size: int
    shuffle_window: int
    readahead: int
    threads: int | None
    index: str | None = None
    source: str | None = None
    label_field: str = "label"
    decoder: str = "auto"
    hw_decoder_load: float | None = None
    io_threads: int = 4
    prefetch: int = 2
    inflight: int = INFLIGHT
    cache: str | None = None
    cache_gb: float = CACHE_GIGABYTES

    def open_dataset(self) -> Dataset:
        """Open the data set; with a `source`, pack it first where it is missing.

        Rank 0 does the work and reports skipped samples.
        Raises: FileNotFoundError, ValueError when `root` holds no data set.
        """
        with config_keys_in_errors(DATASET_KEYS):
            root = parse_root(str(self.root))  # a folder named 2024 arrives as a number
            index = None if self.index is None else local_folder(str(self.index), folder=self.index)
        return open_on_first_rank(
            lambda: self._open_dataset(root, index), root=root, folder=index or Path(str(self.root))
        )

    def _open_dataset(self, root: Root, index: Path | None) -> Dataset:
        if isinstance(root, Path):
            if self.source is not None:
                pack_once(self.source, root)
            if not root.exists():
                raise FileNotFoundError(f"data.root={root} is not a folder: pack one with python -m pipeline.pack")
        elif self.source is not None:
            problem = f"data.source={self.source} is packed into a folder, and data.root={root} is a URL"
            raise ValueError(f"{problem}: add ~data.source")
        return open_tars(root, index, label_field=self.label_field, keys=DATASET_KEYS)

    def open_storage(self, dataset: Dataset) -> Storage:
        """Return the storage of a data set. Raises: ValueError for impossible settings of an object store; OSError."""
        with config_keys_in_errors(STORAGE_KEYS):
            cache = None if self.cache is None else local_folder(str(self.cache), folder=self.cache)
            settings = StorageSettings(self.inflight, cache, self.cache_gb)
            versions = None if cache is None else load_versions(dataset, label_field=self.label_field)
            return open_storage(dataset.root, dataset.shard_bytes, settings=settings, versions=versions)


def build_data(config: DictConfig, *, accumulate: int) -> ShardData:
    """Open the data set of `config.data` and build its loaders with the crops of `config.augment`.

    Raises: FileNotFoundError, ValueError.
    """
    data = build_object(config, "data", kind=DataConfig)
    training, evaluation = build_augmentation(config), build_evaluation_crop(config)
    with config_keys_in_errors(LOADER_KEYS):
        own = {name: getattr(data, name) for name in LOADER_OPTIONS}
        settings = LoaderSettings(seed=config.seed, accumulate=accumulate, **own)
    dataset = data.open_dataset()
    storage = data.open_storage(dataset)
    return ShardData(dataset, training_augment=training, evaluation_crop=evaluation, settings=settings, storage=storage)
