"""ResNets and ResNeXts against torchvision's with the same weights, and against the published counts."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.layers import ConvNet
from models.residual import RESNETS, RESNEXTS, resnet, resnext

# Parameters and multiply-adds in billions at 224 pixels, as torchvision publishes them with its weights.
PUBLISHED = {
    "resnet18": (11_689_512, 1.814),
    "resnet34": (21_797_672, 3.664),
    "resnet50": (25_557_032, 4.089),
    "resnet101": (44_549_160, 7.801),
    "resnet152": (60_192_808, 11.514),
    "resnext50_32x4d": (25_028_904, 4.230),
    "resnext101_32x8d": (88_791_336, 16.414),
    "resnext101_64x4d": (83_455_272, 15.460),
}


def build(variant: str, **options: int) -> ConvNet:
    return (resnet if variant in RESNETS else resnext)(variant, **options)


def copy_by_order(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the tensors of `source`, one after the other, each of the same shape."""
    tensors = list(source.state_dict().values())
    names = list(target.state_dict())
    assert len(tensors) == len(names) > 50
    target.load_state_dict(dict(zip(names, tensors, strict=True)))


@pytest.mark.parametrize("variant", [*RESNETS, *RESNEXTS])
def test_counts_are_the_published_ones(variant: str) -> None:
    parameters, gmacs = PUBLISHED[variant]
    with torch.device("meta"):
        net = build(variant)
        assert sum(parameter.numel() for parameter in net.parameters()) == parameters
        with FlopCounterMode(display=False) as counter:
            assert net(torch.empty(1, 3, 224, 224)).shape == (1, 1000)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=0.001)


@pytest.mark.parametrize("variant", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_logits_and_gradients_equal_torchvisions(variant: str) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(variant)
    ours = build(variant)
    copy_by_order(theirs, ours)
    images = torch.randn(2, 3, 64, 64)
    for mode in (True, False):
        gradients = []
        for net in (theirs.train(mode), ours.train(mode)):
            pixels = images.clone().requires_grad_()
            logits = net(pixels)
            logits.square().sum().backward()
            gradients.append((logits.detach(), pixels.grad))
        (their_logits, their_gradient), (our_logits, our_gradient) = gradients
        assert (our_logits - their_logits).norm() <= 1e-5 * their_logits.norm()
        assert their_gradient is not None
        assert (our_gradient - their_gradient).norm() <= 1e-4 * their_gradient.norm()


def test_stages_end_where_the_resolution_changes() -> None:
    with torch.device("meta"):
        net = resnet("resnet50")
        features = net.stem(torch.empty(32, 3, 224, 224))
        shapes = [tuple(features.shape)]
        for _, stage in net.stages.named_children():
            features = stage(features)
            shapes.append(tuple(features.shape))
    assert [name for name, _ in net.stages.named_children()] == ["stage1", "stage2", "stage3", "stage4"]
    expected = [(64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7)]
    assert shapes == [(32, channels, side, side) for channels, side in expected]


def test_small_images_keep_their_resolution_in_the_stem() -> None:
    with torch.device("meta"):
        net = resnet("resnet18", num_classes=10, in_channels=1, image_size=32)
        assert net.stem(torch.empty(2, 1, 32, 32)).shape == (2, 64, 32, 32)
        assert net(torch.empty(2, 1, 32, 32)).shape == (2, 10)
    # torchvision's ResNet-18 less 990 classes, 7x7x3 - 3x3x1 weights of each of 64 filters.
    assert sum(parameter.numel() for parameter in net.parameters()) == 11_689_512 - 990 * 513 - 64 * (147 - 9)


def test_an_unknown_variant_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean resnet50"):
        resnet("resnet5O")
    with pytest.raises(ValueError, match="at least 2 classes"):
        resnet("resnet18", num_classes=1)
