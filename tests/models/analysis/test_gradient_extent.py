"""Receptive fields by propagation and by gradient, which share no arithmetic."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction

import pytest
import timm
import torch
import torchvision
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.analysis.gradient_extent import LinearNetwork, compare_with_gradient
from models.analysis.intervals import TapPattern, UnknownReceptiveField
from models.analysis.receptive_field import receptive_fields
from models.analysis.trace import TraceError, trace
from tests.support.networks import on_meta
from tests.support.published import PUBLISHED, SMALLEST, Published

# Of other architectures at least one for each stage.
NUM_RESOLUTIONS = {"lenet": 5, "alexnet": 6, "vgg": 10, "convnext": 4}
NUM_RESOLUTIONS |= dict.fromkeys(("resnet", "resnext", "mobilenet", "efficientnet", "coatnet"), 5)
SMALLEST_ROWS = [row for row in PUBLISHED if SMALLEST[row.architecture] == row.variant]


@pytest.mark.parametrize("row", SMALLEST_ROWS, ids=lambda row: row.variant)
def test_gradients_of_every_architecture_agree_with_its_fields(row: Published) -> None:
    comparisons = compare_with_gradient(on_meta(row), (2, row.in_channels, row.image_size, row.image_size))
    expected = NUM_RESOLUTIONS.get(row.architecture, len(on_meta(row).stages))
    assert len(comparisons) >= 2 * expected  # along rows and columns
    assert all(comparison.agrees for comparison in comparisons), [one for one in comparisons if not one.agrees]


@pytest.mark.parametrize("row", SMALLEST_ROWS, ids=lambda row: row.variant)
def test_gradients_reach_the_entire_image_where_fields_are_global(row: Published) -> None:
    size = row.image_size
    traced = trace(on_meta(row), (1, row.in_channels, size, size))
    only_global = [
        position
        for position, axes in enumerate(receptive_fields(traced))
        if axes is not None and not axes.has_local_field and all(field.is_global for field in axes.fields)
    ]
    first = only_global[0] if only_global else len(traced.operations) - 1  # LeNet's local field covers the image
    conv = next(position for position, one in enumerate(traced.operations) if one.name == "convolution")
    linear = LinearNetwork(traced, {first, conv})
    assert linear.extent(first, 0, dim=1) == ((0, size - 1), (0, size - 1))  # one channel of one image
    corner, _ = linear.extent(conv, 0, dim=2)
    assert corner is not None
    assert corner[1] < 12


class Network(nn.Module):
    """Layers in a row, or parallel branches that are cropped to the smallest, then added or concatenated."""

    def __init__(self, *parts: nn.Module, joined: str = "row") -> None:
        super().__init__()
        self.parts, self.joined = nn.ModuleList(parts), joined
        self.mix = nn.Conv2d(CHANNELS * len(parts), CHANNELS, 1)

    def forward(self, images: Tensor) -> Tensor:
        if self.joined == "row":
            for part in self.parts:
                images = part(images)
            return images
        branches = [part(images) for part in self.parts]
        height, width = (min(branch.shape[dim] for branch in branches) for dim in (2, 3))
        branches = [branch[:, :, :height, :width] for branch in branches]
        return sum(branches) if self.joined == "sum" else self.mix(torch.cat(branches, dim=1))


KERNELS = st.integers(1, 5)
CHANNELS = 2


def kernel_layer(draw: st.DrawFn, stride: int) -> nn.Module:
    """A convolution or pooling of this stride with random options."""
    kernel, dilation = (draw(KERNELS), draw(KERNELS)), draw(st.integers(1, 3))
    padding = tuple(draw(st.integers(0, size // 2)) for size in kernel)
    kinds = {
        "conv": lambda: nn.Conv2d(CHANNELS, CHANNELS, kernel, stride=stride, padding=padding, dilation=dilation),
        "depthwise": lambda: nn.Conv2d(CHANNELS, CHANNELS, kernel, stride=stride, padding=padding, groups=CHANNELS),
        "max": lambda: nn.MaxPool2d(
            kernel, stride=stride, padding=padding, dilation=dilation, ceil_mode=draw(st.booleans())
        ),
        "mean": lambda: nn.AvgPool2d(kernel, stride=stride, padding=padding, ceil_mode=draw(st.booleans())),
        "reflect": lambda: nn.Sequential(
            nn.ReflectionPad2d((1, 0, 0, 2)), nn.Conv2d(CHANNELS, CHANNELS, kernel, stride=stride)
        ),
    }
    return kinds[draw(st.sampled_from(sorted(kinds)))]()


@st.composite
def layers(draw: st.DrawFn, stride: int = 0, depth: int = 2) -> nn.Module:
    """A layer or a network of layers with this stride; 0 allows any stride, and larger maps."""
    kinds = ["kernel", "kernel", "pointwise"] + (["upsampling"] if stride == 0 else [])
    kinds += ["sum", "cat"] if depth else []
    kind = draw(st.sampled_from(kinds))
    stride = stride or draw(st.sampled_from([1, 1, 2, 2, 3]))
    if kind == "kernel":
        return kernel_layer(draw, stride)
    if kind == "upsampling":
        kernel, padding = draw(KERNELS), draw(st.integers(0, 1))
        up = nn.ConvTranspose2d(CHANNELS, CHANNELS, kernel + 2 * padding, stride=stride, padding=padding)
        resized = [nn.Upsample(scale_factor=stride, mode=mode) for mode in ("nearest", "bilinear")]
        return draw(st.sampled_from([up, *resized, nn.UpsamplingBilinear2d(scale_factor=stride)]))
    if kind == "pointwise":
        after = [nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace=True), nn.Hardswish(), nn.Conv2d(CHANNELS, CHANNELS, 1)]
        layer = draw(st.sampled_from(after))
        return layer if stride == 1 else Network(layer, kernel_layer(draw, stride))
    branches = [draw(layers(stride=stride, depth=depth - 1)) for _ in range(2)]
    return Network(*branches, joined=kind)


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    return Network(*[draw(layers()) for _ in range(draw(st.integers(1, 5)))])


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(networks())
def test_gradients_of_random_networks_equal_their_fields(net: nn.Module) -> None:
    aligned = [layer for layer in net.modules() if isinstance(layer, nn.UpsamplingBilinear2d)]
    assume(len(aligned) < 2)  # each multiplies the period of the intervals by the size of its map: minutes for two
    try:
        comparisons = compare_with_gradient(net, (1, CHANNELS, 320, 327))
    except TraceError:  # strides leave a map smaller than a kernel
        reject()
    assert {comparison.axis for comparison in comparisons} == {"rows", "columns"}
    assert all(comparison.agrees and comparison.is_inside for comparison in comparisons), comparisons


# Networks of other libraries whose fields equal their gradients.
EXACT = {
    "torchvision": ("googlenet", "regnet_y_400mf", "squeezenet1_1"),
    "timm": ("edgenext_small", "lcnet_050", "levit_128", "poolformer_s12", "resnest14d", "rexnet_100"),
}
SLOW = {
    "torchvision": ("densenet121", "inception_v3", "mnasnet1_0"),
    "timm": (
        *("convmixer_768_32", "xception", "inception_next_tiny", "caformer_s18", "cspresnet50", "dla34"),
        *("hrnet_w18_small", "ese_vovnet19b_dw", "ghostnet_100", "repvgg_a0", "skresnet18"),
    ),
}
# Networks of other libraries that are refused, and why.
REFUSED = {
    "torchvision": {
        "shufflenet_v2_x1_0": "split in stage2.2: it selects channels of concatenated branches",
        "swin_t": "view in features.1.0.attn: it splits 56 rows into windows or patches",
        "vit_b_16": "cat in the network itself: it treats 14 rows x 14 columns as one axis",
    },
    "timm": {
        "efficientvit_b0": "split in stages.2.blocks.1.context_module.main: "
        "it selects channels of concatenated branches",
        "dpn68": "slice in features.conv2_2: it selects channels of concatenated branches",
        "mobilevit_s": "view in stages.2.1: it splits 32 rows into windows or patches",
        "tresnet_m": "view in body.s2d: it splits 224 rows into windows or patches",
        "davit_tiny": "view in stages.0.blocks.0.0: it splits 56 rows into windows or patches",
    },
}


def from_library(library: str, name: str) -> tuple[nn.Module, int]:
    """A network of another library, and its image size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if library == "timm":
            net = timm.create_model(name)
            return net, net.default_cfg["input_size"][-1]
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(name, weights=None, **options), 299 if name == "inception_v3" else 224


def assert_agreement(library: str, name: str) -> None:
    net, size = from_library(library, name)
    comparisons = compare_with_gradient(net, (2, 3, size, size))
    assert comparisons
    assert all(comparison.agrees for comparison in comparisons), [one for one in comparisons if not one.agrees]


@pytest.mark.parametrize(("library", "name"), [(library, name) for library in EXACT for name in EXACT[library]])
def test_gradients_of_other_networks_equal_their_fields(library: str, name: str) -> None:
    assert_agreement(library, name)


@pytest.mark.slow
@pytest.mark.parametrize(("library", "name"), [(library, name) for library in SLOW for name in SLOW[library]])
def test_gradients_of_larger_networks_equal_their_fields(library: str, name: str) -> None:
    assert_agreement(library, name)


@pytest.mark.parametrize(("library", "name"), [(library, name) for library in REFUSED for name in REFUSED[library]])
def test_other_networks_are_refused_by_name(library: str, name: str) -> None:
    net, size = from_library(library, name)
    with pytest.raises(UnknownReceptiveField) as error:
        compare_with_gradient(net, (2, 3, size, size))
    assert str(error.value) == f"receptive field unknown: {REFUSED[library][name]}"


def test_a_wrong_field_disagrees_with_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = TapPattern.kernel
    monkeypatch.setattr(TapPattern, "kernel", lambda size, **options: kernel(size + 1, **options))
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3))
    comparisons = compare_with_gradient(net, (1, 3, 32, 32))
    assert comparisons
    assert not any(comparison.agrees for comparison in comparisons)


def test_fields_with_long_periods_are_compared_on_images_of_moderate_size() -> None:
    resize = nn.UpsamplingBilinear2d(scale_factor=3)  # aligned corners: the pattern repeats after the entire map
    net = nn.Sequential(resize, nn.ConvTranspose2d(2, 2, 2, stride=3), nn.Conv2d(2, 2, 5, stride=3), resize)
    comparisons = compare_with_gradient(net, (1, 2, 64, 67))
    assert len(comparisons) >= 16
    assert all(comparison.agrees and comparison.image_side <= 128 for comparison in comparisons)


def test_fractional_strides_are_exact() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.AdaptiveAvgPool2d(5))
    axes = receptive_fields(trace(net, (1, 3, 29, 29)))[-1]
    assert axes.fields[0].stride == Fraction(2 * 14, 5)
    assert math.isclose(float(axes.fields[0].stride), 5.6)
