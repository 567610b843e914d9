"""Images on which exported files are compared with the network, and the validation split with its labels."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import distribution
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data.loading.inputs import Source, find_images, split_sources
from data.shards.dataset import Dataset
from pipeline.runs.trained import TrainedModel

SPLIT = "val"
PHOTOGRAPHS = "sklearn/datasets/images"  # two, which come with scikit-learn


class Images(NamedTuple):
    """Crops (N, H, W, 3) uint8, and where they come from."""

    crops: Tensor
    description: str


def validation_data(model: TrainedModel) -> Dataset | None:
    """Open the data set of the run; None where it is not there, or has no validation split or another one than then."""
    if isinstance(model.run.data_root, Path) and not model.run.data_root.exists():
        return None
    dataset = model.run.open_dataset()
    is_same = tuple(dataset.classes) == tuple(model.facts.classes) and SPLIT not in model.run.changed_splits(dataset)
    return dataset if is_same and SPLIT in dataset.splits else None


def comparison_images(model: TrainedModel, dataset: Dataset | None, *, given: str | None, count: int) -> Images:
    """Return up to `count` crops: of the images `given`, else of the validation split, else of two photographs.

    Raises: ArgumentError when `given` does not exist or has no image; ValueError when no image can be read.
    """
    sources: Iterable[Source]
    if given is not None:
        sources, description = find_images(given, lines=sys.stdin), given
    elif dataset is not None:
        sources = [source for source, _ in split_sources(dataset, SPLIT, limit=count)]
        description = f"split {SPLIT} of {dataset.name}"
    else:
        sources = find_images(str(distribution("scikit-learn").locate_file(PHOTOGRAPHS)), lines=())
        description = f"scikit-learn's photographs (the run's split {SPLIT} is not there, or has changed)"
    found = [model.crops(batch) for batch in model.decode(islice(sources, count))]
    crops = torch.cat(found) if found else torch.empty(0)
    if not len(crops):
        raise ValueError(f"none of the first {count} images of {description} can be read")
    return Images(crops, f"{len(crops)} {'image' if len(crops) == 1 else 'images'} of {description}")


def labelled_crops(
    model: TrainedModel, samples: Sequence[tuple[Source, int]], *, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield crops (N, H, W, 3) and their labels (N,), without the images that cannot be read."""
    labels = iter([label for _, label in samples])
    for batch in model.decode([source for source, _ in samples], batch_size=batch_size):
        of_batch = list(islice(labels, len(batch.names)))
        readable = [label for label, error in zip(of_batch, batch.errors, strict=True) if error is None]
        if readable:
            yield model.crops(batch), torch.tensor(readable)
