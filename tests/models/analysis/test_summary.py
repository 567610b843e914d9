"""What is read off a network layer by layer, against what is published of it and what torch itself counts."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.analysis.stages import field_of
from models.analysis.summary import Pixels, Window, inspect
from models.analysis.trace import Untraceable
from models.equations.layers import with_reference_ops
from tests.support.networks import Calls, build, on_meta
from tests.support.published import PUBLISHED, SMALLEST, TIMM, Published


def each_variant() -> list[object]:
    """A row a variant, of which only the smallest of each architecture is not slow."""
    small = set(SMALLEST.values())
    return [
        pytest.param(row, id=row.variant, marks=() if row.variant in small else pytest.mark.slow) for row in PUBLISHED
    ]


@pytest.mark.parametrize("row", each_variant())
def test_layers_of_every_variant_come_to_its_published_counts(row: Published) -> None:
    inspection = inspect(on_meta(row), (row.in_channels, row.image_size, row.image_size))
    assert inspection.unknown is None
    assert inspection.parameters == inspection.trainable == row.parameters
    assert sum(layer.parameters for layer in inspection.layers) == row.parameters
    assert inspection.macs / 1e9 == pytest.approx(
        row.gmacs, rel=0.02 if row.source == TIMM else 2e-4, abs=6e-7 if row.gmacs < 0.01 else 6e-4
    )
    assert inspection.layers[-1].shape == (row.num_classes,)


@pytest.mark.parametrize("name", ["mobilevit_s", "swin_tiny_patch4_window7_224", "hrnet_w18_small", "efficientvit_b0"])
def test_counts_of_other_networks_are_those_of_the_flop_counter(name: str) -> None:
    with torch.device("meta"):
        net = timm.create_model(name).eval()
    size = net.default_cfg["input_size"][-1]
    inspection = inspect(net, (3, size, size))
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 3, size, size, device="meta"))
    assert inspection.macs == counter.get_total_flops() // 2
    assert sum(layer.parameters for layer in inspection.layers) == sum(one.numel() for one in net.parameters())


def test_stages_of_resnet18_end_at_the_known_shapes_and_fields() -> None:
    row = next(row for row in PUBLISHED if row.variant == "resnet18")
    inspection = inspect(on_meta(row), (3, 224, 224))
    ends = {name: layers[-1] for name, layers in inspection.stages.items()}
    # He et al. 2016, table 1; the fields are sums over its kernels and strides.
    known = {
        "stem": ((64, 56, 56), 11, 4),
        "stage1": ((64, 56, 56), 43, 4),
        "stage2": ((128, 28, 28), 99, 8),
        "stage3": ((256, 14, 14), 211, 16),
        "stage4": ((512, 7, 7), 435, 32),
    }
    for name, (shape, field, jump) in known.items():
        layer = ends[name]
        assert layer.shape == shape
        assert layer.window == Window(
            Pixels(field, field), Pixels(jump, jump), Pixels((1 - field) / 2, (1 - field) / 2)
        )
    assert (ends["head"].shape, ends["head"].window, ends["head"].whole) == ((1000,), None, True)
    assert inspection.last_window is ends["stage4"]
    assert inspection.first_whole is not None
    assert (inspection.first_whole.name, inspection.first_whole.kind) == ("head.pool", "AdaptiveAvgPool2d")
    assert inspection.layers[0].kind == "Conv2d 7x7, stride 2"


def test_depthwise_layers_say_what_separating_saves() -> None:
    row = next(row for row in PUBLISHED if row.variant == "mobilenet_v1")
    layers = inspect(on_meta(row), (3, 224, 224)).layers
    ratios = [layer.separable for layer in layers if layer.separable is not None]
    # Howard et al. 2017, table 1: the pointwise convolutions have so many filters.
    filters = [64, 128, 128, 256, 256, 512, *[512] * 5, 1024, 1024]
    assert ratios == pytest.approx([1 / count + 1 / 9 for count in filters])


def test_what_only_looks_separable_is_not_called_so() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise, self.pointwise = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.depthwise(images) + self.pointwise(images)

    twice = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.Conv2d(8, 8, 1))
    for net in (Beside(), twice):
        assert [layer.separable for layer in inspect(net, (4, 8, 8)).layers] in ([None] * 2, [None] * 3)


def test_depthwise_layers_in_front_of_a_gate_or_a_linear_layer_count_too() -> None:
    for variant, depthwise in {"mobilenet_v3_small": 11, "convnext_tiny": 18, "efficientnet_b0": 16}.items():
        row = next(row for row in PUBLISHED if row.variant == variant)
        layers = inspect(on_meta(row), (3, row.image_size, row.image_size)).layers
        assert sum("depthwise" in layer.kind for layer in layers) == depthwise
        assert sum(layer.separable is not None for layer in layers) == depthwise


@pytest.mark.parametrize("architecture", ["lenet", "vgg", "resnet", "mobilenet"])
def test_the_equations_see_what_torchs_layers_see(architecture: str) -> None:
    variant = "mobilenet_v1" if architecture == "mobilenet" else SMALLEST[architecture]
    size = 28 if architecture == "lenet" else 64
    ours, theirs = (
        inspect(make(build(architecture, variant, image_size=size)), (3, size, size)).layers
        for make in (lambda net: net, with_reference_ops)
    )
    assert len(ours) > 10
    for one, other in zip(ours, theirs, strict=True):
        assert (one.name, one.shape, one.parameters) == (other.name, other.shape, other.parameters)
        assert (one.window, one.whole) == (other.window, other.whole)


def test_a_network_without_known_fields_is_counted_all_the_same() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.unused = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 4, 3), nn.Linear(2, 2)
            self.unused.requires_grad_(False)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(images).flip(2))

    inspection = inspect(Turned(), (3, 8, 8))
    assert inspection.unknown == "receptive field unknown: flip in the network itself: it moves the map"
    assert [(layer.name, layer.kind, field_of(layer)) for layer in inspection.layers] == [
        ("first", "Conv2d 3x3", "3x3 px"),
        ("", "flip", "unknown"),
        ("second", "Conv2d 3x3", "unknown"),
    ]
    assert inspection.last_window is None
    counts = (inspection.macs, inspection.parameters, inspection.trainable)
    assert counts == (6 * 6 * 9 * 9 + 4 * 4 * 9 * 12, 84 + 112 + 6, 84 + 112)


def test_what_sees_one_axis_whole_is_told_axis_by_axis() -> None:
    def strips(images: torch.Tensor, conv: nn.Module, along: nn.Module) -> torch.Tensor:
        maps = conv(images)
        across = maps.mean(3, keepdim=True)  # strip pooling, Hou et al. 2020
        return along((maps * across).softmax(1).mean(2)) + along(maps.mean(2))  # (N, C, H, W) -> (N, C, W)

    layers = inspect(Calls(strips, nn.Conv2d(3, 4, (3, 5)), nn.Conv1d(4, 4, 3)), (3, 16, 16)).layers
    assert [(layer.kind, field_of(layer)) for layer in layers] == [
        ("Conv2d 3x5", "3x5 px"),
        ("mean", "3 px x all"),
        ("mul", "3x5 px + all columns"),
        ("softmax", "3x5 px + all columns"),
        ("mean", "whole image"),
        ("Conv1d 3", "whole image"),
        ("mean", "all x 5 px"),
        ("Conv1d 3", "all x 7 px"),
        ("add", "whole image"),
    ]


@pytest.mark.parametrize("image", [32, (3, 32), (3, 32.0, 32), (3, 0, 32)])
def test_what_is_no_image_is_refused(image: tuple) -> None:
    with pytest.raises(ValueError, match=r"is no image: give \(C, H, W\), three whole numbers above 0"):
        inspect(nn.Conv2d(3, 4, 3), image)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_any_type_are_seen_in_inference_too(dtype: torch.dtype) -> None:
    row = next(row for row in PUBLISHED if row.variant == "alexnet")  # whose biases are of the type of the kernels
    with torch.inference_mode():
        net = build(row.architecture, row.variant).to(dtype)
        inspection = inspect(net, (3, 224, 224))
    assert (inspection.unknown, inspection.macs) == (None, inspect(on_meta(row), (3, 224, 224)).macs)


def test_networks_without_their_weights_and_with_a_single_number_are_answered() -> None:
    with pytest.raises(Untraceable, match="uninitialized parameter"):
        inspect(nn.LazyConv2d(4, 3), (3, 8, 8))
    loss = inspect(Calls(lambda x, conv: conv(x).mean(), nn.Conv2d(3, 4, 3)), (3, 8, 8)).layers[-1]
    assert (loss.kind, loss.shape, loss.whole) == ("mean", (), True)
