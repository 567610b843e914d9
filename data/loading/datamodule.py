"""The loaders of a data set for Lightning, which knows rank and device only after it has started."""

import os
from dataclasses import dataclass

import pytorch_lightning as pl
import torch

from data.arguments import require
from data.loading.crops import CropPolicy
from data.loading.graph import DecodeSettings
from data.loading.loader import Loader, TrainingLoader
from data.loading.order import EvaluationPlan, TrainingPlan
from data.loading.storage import LocalShards
from data.shards.dataset import Dataset
from data.shards.parallel import available_cores


@dataclass(frozen=True)
class LoaderSettings:
    """Settings of both loaders; `batch_size` is per step and device, `threads=None` this rank's share of the cores.

    `shuffle_window` samples are shuffled together, `readahead` batches are read early. Raises: ValueError below 1.
    """

    batch_size: int
    accumulate: int = 1
    seed: int = 0
    shuffle_window: int = 4_000_000
    readahead: int = 4
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "shuffle_window", "readahead", "threads"):
            value = getattr(self, name)
            is_valid = value is None or (isinstance(value, int) and value >= 1)
            require(is_valid, "must be an integer of at least 1", **{name: value})


class ShardData(pl.LightningDataModule):
    """Training batches in shuffled order; evaluation batches that contain every image of the split once.

    `limit_batches` shortens a training epoch to that number of batches per rank; each epoch has its own order.
    """

    def __init__(
        self, dataset: Dataset, *, training_crop: CropPolicy, evaluation_crop: CropPolicy, settings: LoaderSettings
    ) -> None:
        super().__init__()
        self.dataset, self.settings = dataset, settings
        self.training_crop, self.evaluation_crop = training_crop, evaluation_crop
        self.training_index, self._storage = dataset.index("train"), LocalShards(dataset.root)
        self.limit_batches: int | None = None
        # The test set serves data sets without a validation set.
        self.evaluation_split = next((split for split in ("val", "test") if split in dataset.splits), None)

    @property
    def num_evaluation_images(self) -> int:
        """Images in the evaluation split, 0 without one."""
        return self.dataset.splits[self.evaluation_split].samples if self.evaluation_split else 0

    def training_plan(self, rank: int, world_size: int) -> TrainingPlan:
        """Return a rank's training plan. Raises: ValueError when there are fewer images than a global batch."""
        return TrainingPlan(
            self.training_index.shard_samples,
            seed=self.settings.seed,
            shuffle_window=self.settings.shuffle_window,
            batch_size=self.settings.batch_size,
            accumulate=self.settings.accumulate,
            rank=rank,
            world_size=world_size,
            limit=self.limit_batches,
        )

    def checked_plan(self, world_size: int) -> TrainingPlan:
        """Return the first rank's plan. Raises: ValueError for too few images to train on or to evaluate."""
        if self.evaluation_split is not None:
            EvaluationPlan(self.num_evaluation_images, self.settings.batch_size, world_size=world_size)
        return self.training_plan(0, world_size)

    def train_dataloader(self) -> TrainingLoader:
        """Return this rank's training batches."""
        assert self.trainer is not None
        plan, decode = self.training_plan(self.trainer.global_rank, self.trainer.world_size), self._decode_settings()
        index, crop, seed = self.training_index, self.training_crop, self.settings.seed
        return TrainingLoader(index, self._storage, plan=plan, crop=crop, decode=decode, seed=seed)

    def val_dataloader(self) -> Loader | list[Loader]:
        """Return this rank's share of the evaluation split; an empty list without one."""
        assert self.trainer is not None
        if self.evaluation_split is None:
            return []
        index, batch_size = self.dataset.index(self.evaluation_split), self.settings.batch_size
        plan = EvaluationPlan(len(index), batch_size, self.trainer.global_rank, self.trainer.world_size)
        return Loader(index, self._storage, plan=plan, crop=self.evaluation_crop, decode=self._decode_settings())

    def _decode_settings(self) -> DecodeSettings:
        assert self.trainer is not None
        device: torch.device = self.trainer.strategy.root_device
        device_id = device.index if device.type == "cuda" else None
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", self.trainer.num_devices))
        threads = self.settings.threads or max(1, available_cores() // local_ranks)
        return DecodeSettings(self.dataset.mean, self.dataset.std, device_id, threads, self.settings.readahead)
