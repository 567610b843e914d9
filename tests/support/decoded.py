"""Images of a data set by Python's tarfile and PIL, and the levels of those that a loader returns."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import torch
from PIL import Image, ImageOps

from data.shards.dataset import Dataset


def decode_by_pil(dataset: Dataset, split: str, sample: int) -> Image.Image:
    """Read a sample with Python's tarfile and PIL: upright, RGB."""
    tar, _, key = dataset.index(split).keys([sample])[0].partition(": ")
    with tarfile.open(dataset.root / tar) as shard:
        member = next(m for m in shard if m.name.startswith(key + ".") and not m.name.endswith(".cls"))
        content = shard.extractfile(member)
        assert content is not None
        return ImageOps.exif_transpose(Image.open(io.BytesIO(content.read()))).convert("RGB")


def levels(dataset: Dataset, images: torch.Tensor) -> np.ndarray:
    """Undo the normalisation: (N, 3, H, W) -> (N, H, W, 3) in levels of 0 to 255."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (dataset.mean, dataset.std))
    return ((images * std + mean) * 255).permute(0, 2, 3, 1).numpy()


def first_and_last(dataset: Dataset, split: str) -> list[int]:
    """List the first and the last sample of every class."""
    index = dataset.index(split)
    labels = index.rows(np.arange(len(index))).label
    pairs = [np.flatnonzero(labels == label)[[0, -1]] for label in range(len(dataset.classes))]
    return sorted({int(sample) for pair in pairs for sample in pair})
