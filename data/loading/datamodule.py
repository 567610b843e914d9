"""The loaders of a data set for Lightning: which rank and which device is known only once it has started."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytorch_lightning as pl
import torch

from data.loading.crops import EvaluationView, TrainingView
from data.loading.graph import Decode
from data.loading.loader import Loader, LocalShards, TrainingLoader
from data.loading.order import EvaluationPlan, TrainingPlan
from data.shards.dataset import Dataset
from data.shards.parallel import available_cores


@dataclass(frozen=True)
class Feeding:
    """How a rank is fed: `batch_size` images a step and device, a global batch every `accumulate` steps.

    `window` samples are shuffled together; `readahead` batches are fetched before they
    are needed; `threads` decode, None means this rank's share of the cores.

    Raises: ValueError for a number below 1.
    """

    batch_size: int
    accumulate: int = 1
    seed: int = 0
    window: int = 4_000_000
    readahead: int = 4
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "window", "readahead", "threads"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"data.{name}={value} must be a whole number of at least 1")


class ShardData(pl.LightningDataModule):
    """Training batches in shuffled order, evaluation batches that hold every image of the split once.

    `limit_batches` shortens an epoch of training to so many batches a rank, the next one begins another order.
    """

    def __init__(
        self, dataset: Dataset, *, training_view: TrainingView, evaluation_view: EvaluationView, feeding: Feeding
    ) -> None:
        super().__init__()
        self.dataset, self.feeding = dataset, feeding
        self.training_view, self.evaluation_view = training_view, evaluation_view
        self.training_index = dataset.index("train")
        self.limit_batches: int | None = None
        # Where nobody has split off a validation set, the test set is what there is to look at.
        self.evaluation_split = next((split for split in ("val", "test") if split in dataset.splits), None)

    @property
    def num_evaluation_images(self) -> int:
        """Images in the split that evaluation sees, 0 without one."""
        return self.dataset.splits[self.evaluation_split].samples if self.evaluation_split else 0

    def training_plan(self, rank: int, world_size: int) -> TrainingPlan:
        """What a rank trains on. Raises: ValueError when there are fewer images than a global batch."""
        feeding = self.feeding
        return TrainingPlan(
            self.training_index.shard_samples,
            seed=feeding.seed,
            window=feeding.window,
            batch_size=feeding.batch_size,
            accumulate=feeding.accumulate,
            rank=rank,
            world_size=world_size,
            limit=self.limit_batches,
        )

    def checked_plan(self, world_size: int) -> TrainingPlan:
        """The first rank's plan. Raises: ValueError when there are too few images for so many ranks."""
        if self.evaluation_split is not None:
            EvaluationPlan(self.num_evaluation_images, self.feeding.batch_size, world_size=world_size)
        return self.training_plan(0, world_size)

    def train_dataloader(self) -> TrainingLoader:
        """This rank's training batches."""
        assert self.trainer is not None
        return TrainingLoader(
            self.training_index,
            LocalShards(self.dataset.root),
            plan=self.training_plan(self.trainer.global_rank, self.trainer.world_size),
            view=self.training_view,
            decode=self._decode(),
            seed=self.feeding.seed,
        )

    def val_dataloader(self) -> Loader | list[Loader]:
        """This rank's share of the evaluation split; an empty list without one."""
        assert self.trainer is not None
        if self.evaluation_split is None:
            return []
        index = self.dataset.index(self.evaluation_split)
        plan = EvaluationPlan(
            len(index), self.feeding.batch_size, rank=self.trainer.global_rank, world_size=self.trainer.world_size
        )
        return Loader(
            index, LocalShards(self.dataset.root), plan=plan, view=self.evaluation_view, decode=self._decode()
        )

    def _decode(self) -> Decode:
        assert self.trainer is not None
        device: torch.device = self.trainer.strategy.root_device
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", self.trainer.num_devices))
        threads = self.feeding.threads or max(1, available_cores() // ranks_here)
        device_id = device.index if device.type == "cuda" else None
        dataset, readahead = self.dataset, self.feeding.readahead
        return Decode(dataset.mean, dataset.std, device_id=device_id, threads=threads, readahead=readahead)
