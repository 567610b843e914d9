"""From a model and a split to its answers: log-probabilities of every image, on any number of ranks."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from data.arguments import ArgumentError
from data.augment.augmentation import Augmentation
from data.augment.crops import CropPolicy, EvaluationCrop, ImageSize, height_and_width
from data.loading.loader import Batch, Loader
from data.loading.order import EvaluationPlan, StridedPlan
from data.memory import memory_errors
from data.shards.dataset import Dataset
from pipeline.cli.errors import FailureError, as_message
from pipeline.evaluate.metrics import Answers
from pipeline.evaluate.ranks import Ranks
from pipeline.runs.trained import TrainedModel

Share = list[tuple[NDArray[np.int64], NDArray[np.float64]]]  # samples (n,), log-probabilities (n, K) by batch
Error = ValueError | FailureError
SIZES = (1.0, 8 / 7, 9 / 7, 10 / 7)  # of the image size, for `size=auto`: 224, 256, 288, 320
NAMED = 3  # classes in a message
STEP = 32  # px, by which networks halve their images


def answer_split(
    model: TrainedModel, dataset: Dataset, *, split: str, crop: CropPolicy, batch_size: int, ranks: Ranks
) -> Answers | None:
    """Return log-probabilities for every image of a split, in the order of its index; None on ranks other than 0.

    The temperature is 1. Batches are the same for any number of ranks. Raises: UnreadableImage, ValueError for other
    errors of the data, FailureError.
    """
    index = dataset.index(split)
    plan = StridedPlan(EvaluationPlan(len(index), batch_size), ranks.rank, ranks.world_size)
    labels = class_numbers(dataset, model)
    loader = Loader(
        index, model.run.open_storage(dataset), plan=plan, augment=Augmentation(crop), decode=model.decode_settings
    )
    shares = ranks.gather(_answer_share(model, loader if plan.num_steps else (), batch_size=batch_size))
    found = None if ranks.rank > 0 else _combine(shares, count=len(index), weights=model.run.weights_file)
    ranks.raise_together(found if isinstance(found, Error) else None)
    if found is None or isinstance(found, Error):
        return None
    return Answers(found, labels[index.rows(np.arange(len(index))).label])


def _combine(shares: Iterable[Share | Error], *, count: int, weights: Path) -> NDArray[np.float64] | Error:
    """Return the log-probabilities of all images in their order (count, K), or the error that rank 0 must raise."""
    parts = []
    for share in shares:
        if isinstance(share, Error):
            return share
        parts += share
    samples, found = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.argsort(samples, kind="stable")
    if not np.array_equal(samples[order], np.arange(count)):
        raise RuntimeError(f"{len(samples)} answers for {count} images")  # an image was left out or came twice
    if num_invalid := int((~np.isfinite(found).all(1)).sum()):
        return ValueError(f"{weights} gives NaN for {num_invalid:,} of {count:,} images: its training has diverged")
    return found[order]


def _answer_share(model: TrainedModel, batches: Iterable[Batch], *, batch_size: int) -> Share | Error:
    """Return samples and log-probabilities of this rank's batches, or the error, which rank 0 raises for all."""
    share: Share = []
    try:
        with memory_errors(batch_size), torch.inference_mode():
            for batch in batches:
                logits = model.net(batch.images.to(model.device))
                log_probabilities = torch.log_softmax(logits.double(), dim=1)
                share.append((batch.samples.numpy(), log_probabilities.cpu().numpy()))
    except ValueError as error:
        return type(error)(str(error))
    except OSError as error:
        return as_message(error)
    return share


def class_numbers(dataset: Dataset, model: TrainedModel) -> NDArray[np.int64]:
    """Return the model's number of each class of a data set (K,). Raises: ValueError for a class it does not know."""
    numbers = {name: number for number, name in enumerate(model.classes)}
    unknown = [name for name in dataset.classes if name not in numbers]
    if unknown:
        own = f"its own {len(numbers)} are {_first_names(model.classes)}"
        raise ValueError(f"the run does not know the classes {_first_names(unknown)} of the data set: {own}")
    return np.array([numbers[name] for name in dataset.classes], np.int64)


def _first_names(names: Sequence[str]) -> str:
    return ", ".join([*names[:NAMED], *(["..."] if len(names) > NAMED else [])])


def crops_of_sizes(crop: CropPolicy, size: str | ImageSize | None) -> list[CropPolicy]:
    """Return the crops to try: the run's own, one of `size` pixels, or for "auto" up to 10 / 7 of its own.

    Raises: ValueError for anything else, or a crop that has no size to change.
    """
    if size is None:
        return [crop]
    if not isinstance(crop, EvaluationCrop):
        raise ValueError(f"size={size} needs the run to evaluate with EvaluationCrop, not {type(crop).__name__}")
    if size == "auto":
        own = height_and_width(crop.image_size)
        step = STEP if all(side % STEP == 0 for side in own) else 1
        sizes = {tuple(round(side * factor / step) * step for side in own) for factor in SIZES}
        return [replace(crop, image_size=one) for one in sorted(sizes)]
    try:
        return [replace(crop, image_size=cast(ImageSize, size))]
    except ArgumentError as error:
        raise ValueError(f"size={size} is not auto, null, a number of pixels or [HEIGHT,WIDTH]") from error
