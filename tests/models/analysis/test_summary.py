"""Summaries of networks against published counts and torch's own."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.analysis.receptive_field import ReceptiveField
from models.analysis.summary import LayerSummary, Pixels, summarize
from models.analysis.trace import TraceError
from models.equations.layers import with_reference_ops
from tests.support.networks import Calls, build, on_meta
from tests.support.published import PUBLISHED, SMALLEST, TIMM, Published

UNKNOWN = ((None, False), (None, False))


def axis_fields(layer: LayerSummary) -> tuple[tuple[int | None, bool], ...]:
    """Local size and whether the field is global, along rows and columns."""
    return tuple((field.size, field.is_global) for field in (layer.rows, layer.columns))


def each_variant() -> list[object]:
    """All variants; only the smallest of each architecture is not slow."""
    small = set(SMALLEST.values())
    return [
        pytest.param(row, id=row.variant, marks=() if row.variant in small else pytest.mark.slow) for row in PUBLISHED
    ]


@pytest.mark.parametrize("row", each_variant())
def test_every_variant_has_its_published_counts(row: Published) -> None:
    summary = summarize(on_meta(row), (row.in_channels, row.image_size, row.image_size))
    assert summary.unknown is None
    assert summary.num_parameters == summary.num_trainable == row.parameters
    assert sum(layer.num_parameters for layer in summary.layers) == row.parameters
    assert summary.macs / 1e9 == pytest.approx(
        row.gmacs, rel=0.02 if row.source == TIMM else 2e-4, abs=6e-7 if row.gmacs < 0.01 else 6e-4
    )
    assert summary.layers[-1].shape == (row.num_classes,)


@pytest.mark.parametrize("name", ["mobilevit_s", "swin_tiny_patch4_window7_224", "hrnet_w18_small", "efficientvit_b0"])
def test_other_networks_have_the_counts_of_the_flop_counter(name: str) -> None:
    with torch.device("meta"):
        net = timm.create_model(name).eval()
    size = net.default_cfg["input_size"][-1]
    summary = summarize(net, (3, size, size))
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 3, size, size, device="meta"))
    assert summary.macs == counter.get_total_flops() // 2
    assert sum(layer.num_parameters for layer in summary.layers) == sum(one.numel() for one in net.parameters())


def test_resnet18_has_the_known_shapes_and_fields() -> None:
    row = next(row for row in PUBLISHED if row.variant == "resnet18")
    summary = summarize(on_meta(row), (3, 224, 224))
    ends = {name: layers[-1] for name, layers in summary.stages.items()}
    # Shapes of He et al. 2016, table 1; fields are sums over its kernels and strides.
    known = {
        "stem": ((64, 56, 56), 11, 4),
        "stage1": ((64, 56, 56), 43, 4),
        "stage2": ((128, 28, 28), 99, 8),
        "stage3": ((256, 14, 14), 211, 16),
        "stage4": ((512, 7, 7), 435, 32),
    }
    for name, (shape, size, stride) in known.items():
        layer = ends[name]
        assert layer.shape == shape
        assert layer.rows == layer.columns == ReceptiveField(size, stride, (1 - size) // 2)
        assert layer.local_size == Pixels(size, size)
    head = ends["head"]
    assert (head.shape, head.local_size, head.is_global) == ((1000,), None, True)
    assert summary.last_local_layer is ends["stage4"]
    assert summary.first_global_layer is not None
    assert (summary.first_global_layer.name, summary.first_global_layer.kind) == ("head.pool", "AdaptiveAvgPool2d")
    assert summary.layers[0].kind == "Conv2d 7x7, stride 2"


def test_depthwise_layers_have_their_separable_cost() -> None:
    row = next(row for row in PUBLISHED if row.variant == "mobilenet_v1")
    layers = summarize(on_meta(row), (3, 224, 224)).layers
    ratios = [layer.separable_cost for layer in layers if layer.separable_cost is not None]
    # Filters of the pointwise convolutions, Howard et al. 2017, table 1.
    filters = [64, 128, 128, 256, 256, 512, *[512] * 5, 1024, 1024]
    assert ratios == pytest.approx([1 / count + 1 / 9 for count in filters])


def test_other_pairs_of_layers_have_no_separable_cost() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise, self.pointwise = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.depthwise(images) + self.pointwise(images)

    twice = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.Conv2d(8, 8, 1))
    for net in (Parallel(), twice):
        assert [layer.separable_cost for layer in summarize(net, (4, 8, 8)).layers] in ([None] * 2, [None] * 3)


def test_depthwise_layers_in_one_dimension_are_summarized() -> None:
    net = Calls(lambda x, conv: conv(x.mean(3)), nn.Conv1d(4, 4, 3, groups=4))
    layer = summarize(net, (4, 8, 8)).layers[-1]
    assert (layer.kind, layer.shape, layer.separable_cost) == ("Conv1d 3, depthwise", (4, 6), None)


def test_depthwise_layers_before_a_gate_or_linear_layer_have_a_separable_cost() -> None:
    for variant, depthwise in {"mobilenet_v3_small": 11, "convnext_tiny": 18, "efficientnet_b0": 16}.items():
        row = next(row for row in PUBLISHED if row.variant == variant)
        layers = summarize(on_meta(row), (3, row.image_size, row.image_size)).layers
        assert sum("depthwise" in layer.kind for layer in layers) == depthwise
        assert sum(layer.separable_cost is not None for layer in layers) == depthwise


@pytest.mark.parametrize("architecture", ["lenet", "vgg", "resnet", "mobilenet"])
def test_reference_equations_have_the_fields_of_torchs_layers(architecture: str) -> None:
    variant = "mobilenet_v1" if architecture == "mobilenet" else SMALLEST[architecture]
    size = 28 if architecture == "lenet" else 64
    ours, theirs = (
        summarize(make(build(architecture, variant, image_size=size)), (3, size, size)).layers
        for make in (lambda net: net, with_reference_ops)
    )
    assert len(ours) > 10
    for one, other in zip(ours, theirs, strict=True):
        assert (one.name, one.shape, one.num_parameters) == (other.name, other.shape, other.num_parameters)
        assert (one.rows, one.columns) == (other.rows, other.columns)


def test_networks_with_unknown_fields_are_counted() -> None:
    class Flipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.unused = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 4, 3), nn.Linear(2, 2)
            self.unused.requires_grad_(False)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(images).flip(2))

    summary = summarize(Flipped(), (3, 8, 8))
    assert summary.unknown == "receptive field unknown: flip in the network itself: it flips or rolls the map"
    assert [(layer.name, layer.kind, axis_fields(layer)) for layer in summary.layers] == [
        ("first", "Conv2d 3x3", ((3, False), (3, False))),
        ("", "flip", UNKNOWN),
        ("second", "Conv2d 3x3", UNKNOWN),
    ]
    assert summary.last_local_layer is None
    counts = (summary.macs, summary.num_parameters, summary.num_trainable)
    assert counts == (6 * 6 * 9 * 9 + 4 * 4 * 9 * 12, 84 + 112 + 6, 84 + 112)


def test_fields_may_be_global_along_one_axis_only() -> None:
    def strips(images: torch.Tensor, conv: nn.Module, along: nn.Module) -> torch.Tensor:
        maps = conv(images)
        across = maps.mean(3, keepdim=True)  # strip pooling, Hou et al. 2020
        return along((maps * across).softmax(1).mean(2)) + along(maps.mean(2))  # (N, C, H, W) -> (N, C, W)

    layers = summarize(Calls(strips, nn.Conv2d(3, 4, (3, 5)), nn.Conv1d(4, 4, 3)), (3, 16, 16)).layers
    assert [(layer.kind, axis_fields(layer)) for layer in layers] == [
        ("Conv2d 3x5", ((3, False), (5, False))),
        ("mean", ((3, False), (None, True))),
        ("mul", ((3, False), (5, True))),
        ("softmax", ((3, False), (5, True))),
        ("mean", ((None, True), (5, True))),
        ("Conv1d 3", ((None, True), (7, True))),
        ("mean", ((None, True), (5, False))),
        ("Conv1d 3", ((None, True), (7, False))),
        ("add", ((None, True), (7, True))),
    ]


@pytest.mark.parametrize("image", [32, (3, 32), (3, 32.0, 32), (3, 0, 32)])
def test_invalid_image_shapes_are_refused(image: tuple) -> None:
    with pytest.raises(ValueError, match=r"is not the shape of an image: give \(C, H, W\), three positive integers"):
        summarize(nn.Conv2d(3, 4, 3), image)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_any_type_are_summarized_in_inference_mode(dtype: torch.dtype) -> None:
    row = next(row for row in PUBLISHED if row.variant == "alexnet")  # biases have the type of the kernels
    with torch.inference_mode():
        net = build(row.architecture, row.variant).to(dtype)
        summary = summarize(net, (3, 224, 224))
    assert (summary.unknown, summary.macs) == (None, summarize(on_meta(row), (3, 224, 224)).macs)


def test_lazy_layers_are_refused_and_scalars_summarized() -> None:
    with pytest.raises(TraceError, match="uninitialized parameter"):
        summarize(nn.LazyConv2d(4, 3), (3, 8, 8))
    loss = summarize(Calls(lambda x, conv: conv(x).mean(), nn.Conv2d(3, 4, 3)), (3, 8, 8)).layers[-1]
    assert (loss.kind, loss.shape, loss.is_global) == ("mean", (), True)
