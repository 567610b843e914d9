"""Logits and gradients equal those of torchvision's or timm's networks with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

from models.weights.load import load_weights
from tests.support.networks import build_published, logits_and_gradient, scatter, without_chance
from tests.support.published import HALVED, PUBLISHED, SMALLEST, TIMM, TV, Published

SMALL_SIDE = 96  # pixels: enough for every network that takes any size, and quick
FIXED = {"coatnet": 224}  # the only size of timm's
NAMES = {"mobilenet_v1": "mobilenetv1_100"} | {f"coatnet_{number}": f"coatnet_{number}_224" for number in range(5)}
QUICK = {*SMALLEST.values(), "mobilenet_v1", "mobilenet_v2", "efficientnet_v2_s", "convnext_tiny", "coatnet_0"}


def rows() -> list[object]:
    """Every published row; the expensive ones are slow tests."""
    return [
        pytest.param(row, id=row.variant, marks=() if row.variant in QUICK else pytest.mark.slow)
        for row in PUBLISHED
        if row.source in (TV, TIMM, HALVED)
    ]


def publishers(row: Published) -> nn.Module:
    """The publisher's network."""
    if row.source == TV:
        return torchvision.models.get_model(row.variant)
    if row.source == HALVED:
        return timm.create_model("coatnet_0_224", embed_dim=(48, 96, 192, 384), stem_width=32, head_hidden_size=384)
    return timm.create_model(NAMES.get(row.variant, row.variant))


@pytest.mark.parametrize("row", rows())
def test_logits_and_gradients_equal_the_publishers(row: Published, tmp_path: Path) -> None:
    torch.manual_seed(0)
    their_net = without_chance(scatter(publishers(row)))
    torch.save(their_net.state_dict(), tmp_path / "weights.pth")
    our_net = without_chance(build_published(row))
    load_weights(our_net, tmp_path / "weights.pth")
    side = FIXED.get(row.architecture, SMALL_SIDE)
    images = torch.randn(2, 3, side, side)
    for training in (True, False):
        their_logits, their_gradient = logits_and_gradient(their_net.train(training), images)
        our_logits, our_gradient = logits_and_gradient(our_net.train(training), images)
        assert their_logits.norm() > 0
        assert (our_logits - their_logits).norm() <= 1e-5 * their_logits.norm()
        assert (our_gradient - their_gradient).norm() <= 1e-4 * their_gradient.norm()
    again = build_published(row).eval()
    again.load_state_dict(our_net.state_dict())
    with torch.no_grad():
        assert torch.equal(again(images), our_logits)


def test_every_architecture_with_a_publisher_is_compared() -> None:
    published = [row for row in PUBLISHED if row.source in (TV, TIMM)]
    architectures = {row.architecture for row in published}
    assert architectures == {row.architecture for row in published if row.variant in QUICK}
    assert len(architectures) == 8  # there is no published LeNet: its shapes and counts are the paper's
