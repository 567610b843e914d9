"""Receptive fields of published networks, of layers whose field is known, and what is refused."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from models.analysis.axes import Sight, UnknownReceptiveField
from models.analysis.cost import kept_for_backward
from models.analysis.receptive_field import known_fields, receptive_fields
from models.analysis.trace import Operation, Untraceable, trace
from tests.support.networks import Calls, on_meta
from tests.support.published import PUBLISHED


class Known(NamedTuple):
    """A field in pixels of the input, and what sees the whole image first: a layer, and the field in front of it."""

    field: int
    whole: str
    behind: int


# Found twice, by others than these rules: by propagation over the graph and by gradient. ResNets stride on the 3x3;
# the often quoted 483, 1027 and 1507 belong to variants that stride at the end of a stage. AlexNet and VGG see the
# whole first in the linear layer: at 224 pixels the pooling in front of it takes 6x6 and 7x7 for what they are.
KNOWN = {
    "alexnet": Known(195, "head.linear1", 195),
    "vgg11": Known(150, "head.linear1", 150),
    "vgg16": Known(212, "head.linear1", 212),
    "resnet18": Known(435, "head.pool", 435),
    "resnet34": Known(899, "head.pool", 899),
    "resnet50": Known(427, "head.pool", 427),
    "resnet101": Known(971, "head.pool", 971),
    "resnet152": Known(1451, "head.pool", 1451),
    "resnext50_32x4d": Known(427, "head.pool", 427),
    "resnext101_32x8d": Known(971, "head.pool", 971),
    "mobilenet_v2": Known(491, "head.1.pool", 491),
    "mobilenet_v3_small": Known(639, "stages.stage1.0.gate.pool", 7),
    "mobilenet_v3_large": Known(595, "stages.stage3.0.gate.pool", 35),
    "efficientnet_b0": Known(851, "stages.stage1.0.gate.pool", 7),
    "efficientnet_b4": Known(1799, "stages.stage1.0.gate.pool", 7),
    "efficientnet_b7": Known(3079, "stages.stage1.0.gate.pool", 7),
    "efficientnet_v2_s": Known(1487, "stages.stage4.0.gate.pool", 111),
    "convnext_tiny": Known(1688, "head.pool", 1688),
    "convnext_small": Known(3416, "head.pool", 3416),
    "convnext_base": Known(3416, "head.pool", 3416),
    "convnext_large": Known(3416, "head.pool", 3416),
}
ROWS = [row for row in PUBLISHED if row.variant in KNOWN]


def sights_of(net: nn.Module, *shape: int) -> list[tuple[Operation, Sight]]:
    """What depends on a batch of this shape, operation by operation."""
    traced = trace(net, shape)
    found = zip(traced.operations, receptive_fields(traced), strict=True)
    return [(operation, sight) for operation, sight in found if sight is not None]


def last_of(net: nn.Module, *shape: int) -> Sight:
    return sights_of(net, *shape)[-1][1]


def field_of(sight: Sight) -> list[tuple[int, float, int]]:
    """Size, jump and offset along rows and columns."""
    return [(axis.field.size, float(axis.field.jump), axis.field.offset) for axis in sight.axes if axis.field]


def test_every_known_network_is_compared() -> None:
    assert {row.variant for row in ROWS} == KNOWN.keys()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.variant)
def test_fields_of_published_networks_are_the_known_ones(row: object) -> None:
    known, size = KNOWN[row.variant], row.image_size
    seen = sights_of(on_meta(row), 2, 3, size, size)
    first = next(position for position, (_, sight) in enumerate(seen) if sight.whole)
    assert [field[:2] for field in field_of([sight for _, sight in seen if sight.local][-1])] == [(known.field, 32)] * 2
    assert seen[first][0].layer == known.whole
    assert [field[0] for field in field_of([sight for _, sight in seen[:first] if sight.local][-1])] == [
        known.behind
    ] * 2


def test_coatnet_sees_the_whole_in_the_gates_in_front_of_its_attention() -> None:
    row = next(row for row in PUBLISHED if row.variant == "coatnet_0")
    seen = sights_of(on_meta(row), 2, 3, 224, 224)
    whole = [operation for operation, sight in seen if sight.whole and not sight.local]
    assert whole[0].layer == "stages.stage1.0.gate.pool"
    assert any(operation.layer == "stages.stage3.0.attention" for operation in whole)
    assert {axis.spread for axis in seen[-1][1].axes} == {2}  # poolings over 2x2 beside convolutions over 3x3


@pytest.mark.parametrize(
    ("layer", "shape", "fields"),
    [
        (nn.Conv2d(3, 4, (3, 5), stride=(1, 2), padding=(1, 0)), (1, 3, 9, 9), [(3, 1, -1), (5, 2, 0)]),
        (nn.Conv2d(3, 4, 3, dilation=2), (1, 3, 9, 9), [(5, 1, 0)] * 2),
        (nn.MaxPool2d(2, ceil_mode=True), (1, 3, 9, 9), [(2, 2, 0)] * 2),
        (nn.AvgPool2d(3, stride=2, padding=1), (1, 3, 9, 9), [(3, 2, -1)] * 2),
        (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), (1, 3, 9, 9), [(2, 0.5, 0)] * 2),
        (nn.AdaptiveAvgPool2d(3), (1, 3, 9, 12), [(3, 3, 0), (4, 4, 0)]),
        (nn.AdaptiveAvgPool2d(4), (1, 3, 9, 9), [(3, 2.25, 0)] * 2),
        (nn.AdaptiveMaxPool2d((3, 9)), (1, 3, 9, 9), [(3, 3, 0), (1, 1, 0)]),
        (nn.ZeroPad2d((2, 0, 1, 0)), (1, 3, 9, 9), [(1, 1, -1), (1, 1, -2)]),
        (nn.ReflectionPad2d(1), (1, 3, 9, 9), [(1, 1, -1)] * 2),
        (nn.PixelShuffle(2), (1, 8, 9, 9), [(1, 0.5, 0)] * 2),
        (nn.PixelUnshuffle(2), (1, 3, 8, 8), [(2, 2, 0)] * 2),
        (nn.UpsamplingNearest2d(scale_factor=2), (1, 3, 9, 9), [(1, 0.5, 0)] * 2),
        (nn.Upsample(scale_factor=2, mode="bilinear"), (1, 3, 9, 9), [(2, 0.5, -1)] * 2),
        (nn.Upsample((27, 9), mode="bilinear"), (1, 3, 9, 9), [(2, 1 / 3, -1), (1, 1, 0)]),
        (nn.Upsample((17, 5), mode="bilinear", align_corners=True), (1, 3, 9, 9), [(2, 0.5, 0), (1, 2, 0)]),
        (nn.Sequential(*[nn.Conv2d(3, 3, 3)] * 3), (1, 3, 9, 9), [(7, 1, 0)] * 2),
        (nn.Sequential(nn.BatchNorm2d(3), nn.PReLU(), nn.Dropout()), (1, 3, 9, 9), [(1, 1, 0)] * 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_fields_of_layers_are_those_of_their_arithmetic(layer: nn.Module, shape: tuple[int, ...], fields: list) -> None:
    assert field_of(last_of(layer, *shape)) == fields


def test_layouts_are_followed() -> None:
    def mixed(images: Tensor, conv: nn.Module, linear: nn.Module) -> Tensor:
        tokens = linear(conv(images).flatten(2).transpose(1, 2))  # (N, C, H, W) -> (N, L, C)
        maps = tokens.transpose(1, 2).reshape(2, 4, 5, 7)
        one, other = maps.reshape(2, 2, 2, 5, 7).transpose(1, 2).reshape(2, 4, 5, 7).chunk(2, dim=1)
        return torch.cat([one, other * 2], dim=1)[:, :, 1:, ::2]

    sight = last_of(Calls(mixed, nn.Conv2d(3, 6, 3), nn.Linear(6, 4)), 2, 3, 7, 9)
    assert sight.shape == (2, 4, 4, 4)
    assert field_of(sight) == [(3, 1, 1), (3, 2, 0)]


def test_branches_are_joined_and_misalignment_is_told() -> None:
    branches = (nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.AvgPool2d(2), nn.Conv2d(3, 4, 1))
    sight = last_of(Calls(lambda x, conv, pool, expand: conv(x) + expand(pool(x)), *branches), 1, 3, 8, 8)
    assert field_of(sight) == [(3, 2, -1)] * 2
    assert [float(axis.spread) for axis in sight.axes] == [0.5, 0.5]


@pytest.mark.parametrize(
    "gate",
    [
        lambda x: x * x.mean((2, 3), keepdim=True),
        lambda x: x * nn.functional.adaptive_max_pool2d(x, 1),
        lambda x: x * nn.functional.avg_pool2d(x, 9),
        lambda x: x + (x.flatten(2) @ x.flatten(2).transpose(1, 2)).mean((1, 2))[:, None, None, None],
        lambda x: x + nn.functional.scaled_dot_product_attention(*[x.flatten(2).mT] * 3).mT.reshape(x.shape),
        lambda x: nn.functional.group_norm(x, 1),
        lambda x: nn.functional.instance_norm(x, eps=1e-3),
        lambda x: nn.functional.layer_norm(x, x.shape[1:]),
    ],
)
def test_what_sees_the_whole_image_is_told_beside_the_windows(gate: object) -> None:
    sight = last_of(Calls(lambda x, conv: conv(gate(x)), nn.Conv2d(3, 4, 3)), 2, 3, 9, 9)
    assert sight.whole
    assert field_of(sight) == [(3, 1, 0)] * 2


def test_a_gate_along_one_axis_is_not_the_whole() -> None:
    sight = last_of(Calls(lambda x, conv: conv(x) * conv(x).mean(2, keepdim=True), nn.Conv2d(3, 4, 3)), 2, 3, 9, 9)
    assert [axis.whole for axis in sight.axes] == [True, False]
    assert field_of(sight) == [(3, 1, 0)] * 2


def resized(images: Tensor, scale_factor: float) -> Tensor:
    return nn.functional.interpolate(images, scale_factor=scale_factor, mode="bilinear")


def cat(images: Tensor) -> Tensor:
    """Eight channels, of which the first see one pixel, the others 3x3."""
    wide = torch.cat([images] * 2, dim=1)[:, :4]
    return torch.cat([wide, nn.functional.avg_pool2d(wide, 3, 1, 1)], dim=1)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.flip(3), "flip .*: it moves the map"),
        (lambda x: x.roll(1, 2), "roll .*: it moves the map"),
        (lambda x: x.cumsum(2), "cumsum .*: there is no rule for it"),
        (lambda x: nn.functional.interpolate(x, 12, mode="bicubic"), "upsample_bicubic2d .*: there is no rule for it"),
        (
            lambda x: nn.functional.interpolate(x, 1, mode="bilinear", align_corners=True),
            "upsample_bilinear2d .*: it lays the corners of 8 positions on those of 1",
        ),
        (lambda x: resized(x, scale_factor=1.3), "upsample_bilinear2d .*: it resizes 8 positions to 10 by a factor of"),
        (lambda x: x.reshape(2, 3, 2, 4, 8), "view .*: it cuts 8 rows into pieces"),
        (lambda x: torch.cat([x, x], dim=2), "cat .*: it puts maps side by side"),
        (lambda x: x + x.transpose(2, 3), "add .*: it lays 8 columns beside 8 rows"),
        (lambda x: x[:, :, :4].mean((2, 3)), "mean .*: it takes 4 rows, which do not see all of the image"),
        (lambda x: x + x[:, :, :1], "add .*: it takes 1 rows, which do not see all of the image"),
        (lambda x: x[:, :, ::2, ::2] + x[:, :, :4, :4], "add .*: branches whose positions are 2 and 1 pixels apart"),
        (lambda x: cat(x)[:, :2], "slice .*: it takes some channels of branches that were put side by side"),
        (lambda x: nn.functional.pad(x, (0, 0, 0, 0, 0, 3))[:, 3:], "slice .*: it takes some channels of branches"),
        (lambda x: nn.functional.pixel_shuffle(cat(x)[:, :8], 2), "pixel_shuffle .*: it lays channels of branches"),
        (lambda x: torch.fft.fft(x).real, "fft_r2c .*: there is no rule for it"),
    ],
)
def test_what_is_not_known_is_named_and_refused(function: object, reason: str) -> None:
    with pytest.raises(UnknownReceptiveField, match=f"receptive field unknown: {reason}"):
        sights_of(Calls(function), 2, 3, 8, 8)


def test_what_was_overwritten_under_another_shape_is_refused() -> None:
    def overwritten(images: Tensor, conv: nn.Module) -> Tensor:
        maps = conv(images)
        maps.view(2, 4, -1).add_(nn.functional.max_pool2d(maps, 3, 1, 1).flatten(2))
        return maps * 2

    with pytest.raises(UnknownReceptiveField, match=r"mul .*: it reads what was overwritten under another shape"):
        sights_of(Calls(overwritten, nn.Conv2d(3, 4, 3)), 2, 3, 8, 8)


def test_what_is_filled_with_a_number_of_the_image_sees_it() -> None:
    def filled(images: Tensor, conv: nn.Module) -> Tensor:
        maps = conv(images)
        return maps / torch.zeros_like(maps).fill_(images.amax())

    assert last_of(Calls(filled, nn.Conv2d(3, 4, 3)), 2, 3, 8, 8).whole


def test_padding_does_not_bring_back_what_was_cut_off() -> None:
    def cut(images: Tensor) -> Tensor:
        return nn.functional.pad(images[:, :, 2:-2, 2:-2], (2,) * 4).mean((2, 3))

    with pytest.raises(UnknownReceptiveField, match="it takes 8 rows, which do not see all of the image"):
        sights_of(Calls(cut), 2, 3, 8, 8)
    assert last_of(Calls(lambda x: x[:, :, ::2, ::2].mean((2, 3))), 2, 3, 8, 8).whole


@pytest.mark.parametrize("known_first", [True, False])
def test_a_frame_into_which_something_unknown_is_written_stays_unknown(known_first: bool) -> None:
    def framed(images: Tensor, conv: nn.Module) -> Tensor:
        frame, maps = images.new_zeros(2, 3, 8, 8), conv(images)
        above, below = frame[:, :, :4], frame[:, :, 4:]
        if known_first:
            below.copy_(maps[:, :, :4])
        above.copy_(images[:, :, :4].flip(2))
        if not known_first:
            below.copy_(maps[:, :, :4])
        return torch.cat([maps, frame * 2], dim=1)

    traced = trace(Calls(framed, nn.Conv2d(3, 3, 3, padding=1)), (2, 3, 8, 8))
    found, unknown = known_fields(traced)
    assert unknown == "receptive field unknown: flip in the network itself: it moves the map"
    last = {operation.name: sight for operation, sight in zip(traced.operations, found, strict=True)}
    assert last["convolution"] is not None
    assert (last["mul"], last["cat"]) == (None, None)


def test_views_of_what_is_unknown_are_unknown_and_other_branches_are_not() -> None:
    def branched(images: Tensor, conv: nn.Module) -> Tensor:
        maps = conv(images)
        flat, lost = maps.flatten(2), images.flip(2)
        maps.add_(lost)  # in place, so also in the view
        return torch.cat([flat * 2, conv(images).flatten(2)], dim=1)

    traced = trace(Calls(branched, nn.Conv2d(3, 3, 3, padding=1)), (2, 3, 8, 8))
    found, _ = known_fields(traced)
    known = [(operation.name, sight is not None) for operation, sight in zip(traced.operations, found, strict=True)]
    assert ("mul", False) in known
    assert known[-3:] == [("convolution", True), ("view", True), ("cat", False)]


def test_a_network_that_needs_numbers_says_so() -> None:
    with pytest.raises(Untraceable, match=r"Calls does not run on shapes \(N, C, H, W\) = \(2, 3, 8, 8\)"):
        trace(Calls(lambda x: x if x.sum() > 0 else -x), (2, 3, 8, 8))


def test_what_is_used_twice_or_shared_is_put_back() -> None:
    conv, other = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
    other.weight = conv.weight
    net = nn.Sequential(conv, nn.ReLU(), conv, other)
    assert field_of(last_of(net, 1, 3, 9, 9)) == [(7, 1, 0)] * 2
    assert kept_for_backward(net, (1, 3, 9, 9), precision="32-true") == 4 * 3 * (7 * 7 + 5 * 5)
    assert net[0] is net[2]
    assert net[3].weight is net[0].weight is conv.weight
    assert {parameter.device.type for parameter in net.parameters()} == {"cpu"}


def test_tracing_leaves_a_network_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    net[1].eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    traced = trace(net, (2, 3, 8, 8))
    assert traced.outputs is not None
    assert traced.outputs.shape == (2, 4, 6, 6)
    assert [layer.training for layer in net.modules()] == [True, True, False, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in net.modules())
