"""Losses: functions of logits (N, K) and labels (N,) that return one loss per image, (N,)."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from models.arguments import require

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of each image, (N,), with the smoothed labels of Szegedy et al. 2016, section 7."""
    require(0 <= label_smoothing < 1, "must be at least 0 and less than 1", label_smoothing=label_smoothing)
    return functional.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
