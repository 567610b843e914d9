"""Batch norms in short trainings: their averages end at the statistics of the images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.layers import batch_norms
from models.norms import fit_momentum
from tests.support.networks import build


def average_after(num_batches: int, *, fitted: bool) -> float:
    """The average of a norm with MobileNetV3's momentum after batches with a mean of 3."""
    norm = nn.BatchNorm2d(1, momentum=0.01)
    if fitted:
        fit_momentum(norm, num_batches)
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_batches):
        norm(3 + torch.randn(16, 1, 4, 4, generator=generator))
    assert norm.running_mean is not None
    return norm.running_mean.item()


@pytest.mark.parametrize("num_batches", [10, 90, 499])
def test_averages_reach_the_statistics_of_a_short_training(num_batches: int) -> None:
    assert average_after(num_batches, fitted=True) == pytest.approx(3, rel=0.02)
    assert average_after(num_batches, fitted=False) < 3 * (1 - 0.99**num_batches) * 1.02


def test_only_norms_that_would_lag_change() -> None:
    net = build("mobilenet", "mobilenet_v3_small", num_classes=10, image_size=32)
    assert fit_momentum(net, 500) is None
    given = fit_momentum(net, 90, is_given=True)
    assert given == "momentum 0.01 as given; after all 90 batches 40.5% of an average is as it began"
    assert {norm.momentum for norm in batch_norms(net)} == {0.01}
    changed = fit_momentum(net, 90)
    assert changed == "momentum 0.056 instead of 0.01, for a training of 90 batches"
    assert {norm.momentum for norm in batch_norms(net)} == {5 / 90}
    assert fit_momentum(nn.BatchNorm2d(1), 50) is None
    assert fit_momentum(nn.Linear(1, 1), 1) is None
    kept = nn.BatchNorm2d(1, momentum=None)  # an average over all batches
    assert fit_momentum(kept, 1) is None
    assert kept.momentum is None
