"""Losses of mixed images against timm's."""

from __future__ import annotations

import pytest
import torch
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor

from models.learning.losses import binary_cross_entropy, cross_entropy
from models.learning.mixing import Mix, mix_labels

CLASSES = 7


def make_pair() -> tuple[Tensor, Tensor]:
    """Logits of two images, whose partners are each other with us and with timm, and their labels."""
    return 3 * torch.randn(2, CLASSES, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 2])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("lam", [0.0, 0.1, 0.4, 0.85, 1.0])
def test_the_loss_of_a_mixture_is_timms(lam: float, smoothing: float) -> None:
    logits, labels = make_pair()
    ours = mix_labels(labels, Mix(lam), num_classes=CLASSES)
    theirs = mixup_target(labels, CLASSES, lam, smoothing)
    expected = SoftTargetCrossEntropy()(logits, theirs)
    assert cross_entropy(logits, ours, label_smoothing=smoothing).mean().item() == pytest.approx(
        expected.item(), abs=1e-6
    )
    for threshold in (None, 0.0, 0.2):
        expected = BinaryCrossEntropy(target_threshold=threshold)(logits, theirs)
        found = binary_cross_entropy(logits, ours, label_smoothing=smoothing, target_threshold=threshold)
        assert found.shape == (2,)
        assert found.mean().item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_binary_loss_of_labels_is_timms(smoothing: float, threshold: float | None) -> None:
    logits, labels = make_pair()
    for place in range(2):
        expected = BinaryCrossEntropy(smoothing, threshold)(logits[[place]], labels[[place]])
        found = binary_cross_entropy(logits, labels, label_smoothing=smoothing, target_threshold=threshold)
        assert found[place].item() == pytest.approx(expected.item(), abs=1e-6)


def test_a_threshold_makes_both_classes_of_a_mixture_present() -> None:
    targets = mix_labels(torch.tensor([0, 1]), Mix(0.3), num_classes=3)
    right = torch.tensor([[50.0, 50.0, -50.0]] * 2)
    assert binary_cross_entropy(right, targets, target_threshold=0.2).max() < 1e-6
    assert binary_cross_entropy(right, targets).min() > 1


@pytest.mark.parametrize("threshold", [-0.1, 1.0])
def test_an_impossible_threshold_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=f"^target_threshold={threshold} must be at least 0 and less than 1, or null$"):
        binary_cross_entropy(*make_pair(), target_threshold=threshold)
