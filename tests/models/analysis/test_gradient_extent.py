"""Two ways to one receptive field: propagation by rules, and the extent of the gradient. They share no arithmetic."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction

import pytest
import timm
import torch
import torchvision
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.analysis.axes import UnknownReceptiveField
from models.analysis.gradient_extent import Linear, check
from models.analysis.receptive_field import receptive_fields
from models.analysis.trace import Untraceable, trace
from tests.support.networks import on_meta
from tests.support.published import PUBLISHED, SMALLEST, Published

SMALLEST_ROWS = [row for row in PUBLISHED if SMALLEST[row.architecture] == row.variant]


@pytest.mark.parametrize("row", SMALLEST_ROWS, ids=lambda row: row.variant)
def test_gradients_of_every_architecture_extend_over_its_field(row: Published) -> None:
    comparisons = check(on_meta(row), (2, row.in_channels, row.image_size, row.image_size))
    assert len(comparisons) >= 8  # at the end of four resolutions and more, along rows and columns
    assert all(comparison.agrees for comparison in comparisons), [one for one in comparisons if not one.agrees]


@pytest.mark.parametrize("row", SMALLEST_ROWS, ids=lambda row: row.variant)
def test_gradients_reach_the_whole_image_where_it_is_said_to_be_seen(row: Published) -> None:
    size = row.image_size
    traced = trace(on_meta(row), (1, row.in_channels, size, size))
    sights = receptive_fields(traced)
    first = next((place for place, sight in enumerate(sights) if sight and sight.whole and not sight.local), None)
    conv = next(place for place, one in enumerate(traced.operations) if one.name == "convolution")
    if first is None:  # LeNet, whose windows alone lead to all of it
        first = len(sights) - 1
    linear = Linear(traced, {first, conv})
    assert linear.extent(first, 0, dim=1) == ((0, size - 1), (0, size - 1))  # one channel of one image
    corner = linear.extent(conv, 0, dim=2).rows
    assert corner is not None
    assert corner[1] < 12


class Network(nn.Module):
    """Layers in a row, or side by side and then added or concatenated, cut to the smallest of them."""

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


def window_layer(draw: st.DrawFn, stride: int) -> nn.Module:
    """A convolution or pooling of this stride, with all that can be chosen."""
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
    """A layer or a network of them, of this stride; 0 takes any, and may also make maps larger."""
    kinds = ["window", "window", "pointwise"] + (["upwards"] if stride == 0 else []) + (["sum", "cat"] if depth else [])
    kind = draw(st.sampled_from(kinds))
    stride = stride or draw(st.sampled_from([1, 1, 2, 2, 3]))
    if kind == "window":
        return window_layer(draw, stride)
    if kind == "upwards":
        kernel, padding = draw(KERNELS), draw(st.integers(0, 1))
        up = nn.ConvTranspose2d(CHANNELS, CHANNELS, kernel + 2 * padding, stride=stride, padding=padding)
        resized = [nn.Upsample(scale_factor=stride, mode=mode) for mode in ("nearest", "bilinear")]
        return draw(st.sampled_from([up, *resized, nn.UpsamplingBilinear2d(scale_factor=stride)]))
    if kind == "pointwise":
        after = [nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace=True), nn.Hardswish(), nn.Conv2d(CHANNELS, CHANNELS, 1)]
        layer = draw(st.sampled_from(after))
        return layer if stride == 1 else Network(layer, window_layer(draw, stride))
    branches = [draw(layers(stride=stride, depth=depth - 1)) for _ in range(2)]
    return Network(*branches, joined=kind)


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    return Network(*[draw(layers()) for _ in range(draw(st.integers(1, 5)))])


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(networks())
def test_gradients_of_random_networks_extend_over_their_fields(net: nn.Module) -> None:
    try:
        comparisons = check(net, (1, CHANNELS, 320, 327))
    except Untraceable:  # its strides leave less of a map than its kernels are large
        reject()
    assert {comparison.axis for comparison in comparisons} == {"rows", "columns"}
    assert all(comparison.agrees and comparison.inside for comparison in comparisons), comparisons


# Networks that are not ours: their fields equal their gradients'.
EXACT = {
    "torchvision": ("googlenet", "mnasnet1_0", "regnet_y_400mf", "squeezenet1_1"),
    "timm": (
        *("edgenext_small", "ese_vovnet19b_dw", "ghostnet_100", "lcnet_050", "levit_128", "poolformer_s12"),
        *("repvgg_a0", "resnest14d", "rexnet_100", "skresnet18"),
    ),
}
SLOW = {
    "torchvision": ("densenet121", "inception_v3"),
    "timm": (
        *("convmixer_768_32", "xception", "inception_next_tiny"),
        *("caformer_s18", "cspresnet50", "dla34", "hrnet_w18_small"),
    ),
}
# And those that are refused, for the reason that is named.
REFUSED = {
    "torchvision": {
        "shufflenet_v2_x1_0": "split in stage2.2: it takes some channels of branches that were put side by side",
        "swin_t": "view in features.1.0.attn: it cuts 56 rows into pieces, windows or patches",
        "vit_b_16": "cat in the network itself: it takes 14 rows x 14 columns for one axis",
    },
    "timm": {
        "efficientvit_b0": "split in stages.2.blocks.1.context_module.main: "
        "it takes some channels of branches that were put side by side",
        "dpn68": "slice in features.conv2_2: it takes some channels of branches that were put side by side",
        "mobilevit_s": "view in stages.2.1: it cuts 32 rows into pieces, windows or patches",
        "tresnet_m": "view in body.s2d: it cuts 224 rows into pieces, windows or patches",
        "davit_tiny": "view in stages.0.blocks.0.0: it cuts 56 rows into pieces, windows or patches",
    },
}


def other(library: str, name: str) -> tuple[nn.Module, int]:
    """A network of another library, and the side of its images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if library == "timm":
            net = timm.create_model(name)
            return net, net.default_cfg["input_size"][-1]
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(name, weights=None, **options), 299 if name == "inception_v3" else 224


def assert_exact(library: str, name: str) -> None:
    net, size = other(library, name)
    comparisons = check(net, (2, 3, size, size))
    assert comparisons
    assert all(comparison.agrees for comparison in comparisons), [one for one in comparisons if not one.agrees]


@pytest.mark.parametrize(("library", "name"), [(library, name) for library in EXACT for name in EXACT[library]])
def test_gradients_of_other_networks_extend_over_their_fields(library: str, name: str) -> None:
    assert_exact(library, name)


@pytest.mark.slow
@pytest.mark.parametrize(("library", "name"), [(library, name) for library in SLOW for name in SLOW[library]])
def test_gradients_of_larger_networks_extend_over_their_fields(library: str, name: str) -> None:
    assert_exact(library, name)


@pytest.mark.parametrize(("library", "name"), [(library, name) for library in REFUSED for name in REFUSED[library]])
def test_other_networks_are_refused_by_name(library: str, name: str) -> None:
    net, size = other(library, name)
    with pytest.raises(UnknownReceptiveField) as error:
        check(net, (2, 3, size, size))
    assert str(error.value) == f"receptive field unknown: {REFUSED[library][name]}"


def test_a_wrong_field_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from models.analysis import op_rules as rules

    monkeypatch.setattr(rules, "window", lambda kernel, **options: wrong(kernel + 1, **options))
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3))
    assert not any(comparison.agrees for comparison in check(net, (1, 3, 32, 32)))


def wrong(kernel: int, **options: int) -> object:
    from models.analysis.intervals import window

    return window(kernel, **options)


def test_fractions_of_pixels_are_exact() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.AdaptiveAvgPool2d(5))
    sight = receptive_fields(trace(net, (1, 3, 29, 29)))[-1]
    assert sight.axes[0].field.jump == Fraction(2 * 14, 5)
    assert math.isclose(float(sight.axes[0].field.jump), 5.6)
