"""Loaders over small data sets."""

from __future__ import annotations

from data.augment.augmentation import Augmentation
from data.augment.crops import CropPolicy, TrainingCrop
from data.loading.decoder import DecodeSettings
from data.loading.loader import TrainingLoader
from data.loading.order import TrainingPlan
from data.shards.dataset import Dataset
from data.storage.local import LocalShards


def training(
    dataset: Dataset, *, image_size: int = 32, crop: CropPolicy | None = None, batch_size: int = 8, **plan: int
) -> TrainingLoader:
    """Return the training loader of a data set, which decodes on the CPU."""
    index, decode = dataset.index("train"), DecodeSettings(dataset.mean, dataset.std)
    order = TrainingPlan(index.shard_samples, seed=0, shuffle_window=1_000_000, batch_size=batch_size, **plan)
    augment = Augmentation(crop or TrainingCrop(image_size))
    return TrainingLoader(index, LocalShards(dataset.root), plan=order, augment=augment, decode=decode)
