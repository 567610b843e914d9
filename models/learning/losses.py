"""Losses: functions of logits (N, K) that return one loss per image, (N,).

Labels are classes, (N,), or probabilities, (N, K), as mixup and CutMix make them.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from models.arguments import require

Loss = Callable[[Tensor, Tensor], Tensor]


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Return a probability of 1 for each label. Shapes: int64 (N,) -> float32 (N, K)."""
    # functional.one_hot would count in int64 and, on a CPU, read the labels to check them.
    return (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of each image, (N,), with the smoothed labels of Szegedy et al. 2016, section 7."""
    _check_smoothing(label_smoothing)
    return functional.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")


def binary_cross_entropy(
    logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, target_threshold: float | None = None
) -> Tensor:
    """Return the mean over classes of the binary cross-entropy of each image, (N,): each class is present or not.

    Wightman et al. 2021; the mean is timm's. Labels are smoothed as in `cross_entropy`. With a `target_threshold` a
    class is present, with a probability of 1, where its probability is above it: both classes of most mixed images.
    """
    _check_smoothing(label_smoothing)
    is_fraction = target_threshold is None or 0 <= target_threshold < 1
    require(is_fraction, "must be at least 0 and less than 1, or null", target_threshold=target_threshold)
    num_classes = logits.shape[1]
    targets = one_hot(labels, num_classes) if labels.ndim == 1 else labels  # (N, K)
    targets = targets * (1 - label_smoothing) + label_smoothing / num_classes
    if target_threshold is not None:
        targets = (targets > target_threshold).float()
    return functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)


def _check_smoothing(label_smoothing: float) -> None:
    require(0 <= label_smoothing < 1, "must be at least 0 and less than 1", label_smoothing=label_smoothing)
