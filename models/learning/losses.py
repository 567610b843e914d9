"""Losses: functions of logits (N, K) and labels (N,) that return one loss per image, (N,)."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of each image, (N,), with the smoothed labels of Szegedy et al. 2016, section 7."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} must be at least 0 and less than 1")
    return functional.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
