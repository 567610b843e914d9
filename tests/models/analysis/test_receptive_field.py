"""Receptive fields of published networks and of single layers, and operations that are refused."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.analysis.axes import TensorAxes
from models.analysis.cost import kept_for_backward
from models.analysis.intervals import UnknownReceptiveField
from models.analysis.receptive_field import ReceptiveField, known_fields, receptive_fields
from models.analysis.trace import Operation, TraceError, trace
from tests.support.networks import Calls, on_meta
from tests.support.published import PUBLISHED, Published


class Known(NamedTuple):
    """A field in pixels of the input, and the first layer with a global field with the local field before it."""

    field: int
    first_global: str
    before: int


# Computed independently of these rules, by propagation over the graph and by gradient. ResNets stride in the 3x3; the
# often quoted 483, 1027 and 1507 belong to variants that stride at the end of a stage. AlexNet and VGG become global in
# the linear layer: at 224 pixels the adaptive pooling before it keeps its 6x6 and 7x7 maps.
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


def fields_of(net: nn.Module, *shape: int) -> list[tuple[Operation, TensorAxes]]:
    """The operations that depend on a batch of this shape, with their fields."""
    traced = trace(net, shape)
    fields = zip(traced.operations, receptive_fields(traced), strict=True)
    return [(operation, axes) for operation, axes in fields if axes is not None]


def last_of(net: nn.Module, *shape: int) -> TensorAxes:
    return fields_of(net, *shape)[-1][1]


def local_fields(axes: TensorAxes) -> list[tuple[int, float, int]]:
    """Size, stride and offset along rows and columns."""
    fields = [ReceptiveField.along(field) for field in axes.fields if field.has_local_path]
    return [(field.size, field.stride, field.offset) for field in fields]


def is_global(axes: TensorAxes) -> bool:
    return all(field.is_global for field in axes.fields)


def test_every_known_network_is_compared() -> None:
    assert {row.variant for row in ROWS} == KNOWN.keys()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.variant)
def test_published_networks_have_the_known_fields(row: Published) -> None:
    known, size = KNOWN[row.variant], row.image_size
    operations = fields_of(on_meta(row), 2, 3, size, size)
    first = next(position for position, (_, axes) in enumerate(operations) if is_global(axes))
    assert operations[first][0].layer == known.first_global
    last, before = ([axes for _, axes in operations[:end] if axes.has_local_field][-1] for end in (None, first))
    assert [field[:2] for field in local_fields(last)] == [(known.field, 32)] * 2
    assert [field[0] for field in local_fields(before)] == [known.before] * 2


def test_coatnet_is_global_from_the_gates_before_its_attention() -> None:
    row = next(row for row in PUBLISHED if row.variant == "coatnet_0")
    operations = fields_of(on_meta(row), 2, 3, 224, 224)
    only_global = [operation for operation, axes in operations if is_global(axes) and not axes.has_local_field]
    assert only_global[0].layer == "stages.stage1.0.gate.pool"
    assert any(operation.layer == "stages.stage3.0.attention" for operation in only_global)
    # Poolings over 2x2 meet convolutions over 3x3.
    assert {field.misalignment for field in operations[-1][1].fields} == {2}


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
def test_layers_have_the_fields_of_their_arithmetic(layer: nn.Module, shape: tuple[int, ...], fields: list) -> None:
    assert local_fields(last_of(layer, *shape)) == fields


def test_fields_follow_layouts() -> None:
    def mixed(images: Tensor, conv: nn.Module, linear: nn.Module) -> Tensor:
        tokens = linear(conv(images).flatten(2).transpose(1, 2))  # (N, C, H, W) -> (N, L, C)
        maps = tokens.transpose(1, 2).reshape(2, 4, 5, 7)
        one, other = maps.reshape(2, 2, 2, 5, 7).transpose(1, 2).reshape(2, 4, 5, 7).chunk(2, dim=1)
        return torch.cat([one, other * 2], dim=1)[:, :, 1:, ::2]

    axes = last_of(Calls(mixed, nn.Conv2d(3, 6, 3), nn.Linear(6, 4)), 2, 3, 7, 9)
    assert axes.shape == (2, 4, 4, 4)
    assert local_fields(axes) == [(3, 1, 1), (3, 2, 0)]


def test_branches_are_joined_with_their_misalignment() -> None:
    branches = (nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.AvgPool2d(2), nn.Conv2d(3, 4, 1))
    axes = last_of(Calls(lambda x, conv, pool, expand: conv(x) + expand(pool(x)), *branches), 1, 3, 8, 8)
    assert local_fields(axes) == [(3, 2, -1)] * 2
    assert [float(field.misalignment) for field in axes.fields] == [0.5, 0.5]


@pytest.mark.parametrize(
    "gate",
    [
        lambda x: x * x.mean((2, 3), keepdim=True),
        lambda x: x * functional.adaptive_max_pool2d(x, 1),
        lambda x: x * functional.avg_pool2d(x, 9),
        lambda x: x + (x.flatten(2) @ x.flatten(2).transpose(1, 2)).mean((1, 2))[:, None, None, None],
        lambda x: x + functional.scaled_dot_product_attention(*[x.flatten(2).mT] * 3).mT.reshape(x.shape),
        lambda x: functional.group_norm(x, 1),
        lambda x: functional.instance_norm(x, eps=1e-3),
        lambda x: functional.layer_norm(x, x.shape[1:]),
    ],
)
def test_global_paths_leave_the_local_field(gate: object) -> None:
    axes = last_of(Calls(lambda x, conv: conv(gate(x)), nn.Conv2d(3, 4, 3)), 2, 3, 9, 9)
    assert is_global(axes)
    assert local_fields(axes) == [(3, 1, 0)] * 2


def test_a_gate_along_one_axis_is_global_along_that_axis_only() -> None:
    axes = last_of(Calls(lambda x, conv: conv(x) * conv(x).mean(2, keepdim=True), nn.Conv2d(3, 4, 3)), 2, 3, 9, 9)
    assert [field.is_global for field in axes.fields] == [True, False]
    assert local_fields(axes) == [(3, 1, 0)] * 2


def cat(images: Tensor) -> Tensor:
    """Eight channels: the first read one pixel, the others 3x3."""
    wide = torch.cat([images] * 2, dim=1)[:, :4]
    return torch.cat([wide, functional.avg_pool2d(wide, 3, 1, 1)], dim=1)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.flip(3), "flip .*: it flips or rolls the map"),
        (lambda x: x.roll(1, 2), "roll .*: it flips or rolls the map"),
        (lambda x: x.cumsum(2), "cumsum .*: no rule for this operation"),
        (nn.Upsample(12, mode="bicubic"), "upsample_bicubic2d .*: no rule for this operation"),
        (nn.UpsamplingBilinear2d(1), "upsample_bilinear2d .*: it aligns the corners of 8 positions with those of 1"),
        (nn.Upsample(scale_factor=1.3, mode="bilinear"), "upsample_bil.*: it resizes 8 positions to 10 by a factor of"),
        (lambda x: x.reshape(2, 3, 2, 4, 8), "view .*: it splits 8 rows into windows or patches"),
        (lambda x: torch.cat([x, x], dim=2), "cat .*: it concatenates maps along rows or columns"),
        (lambda x: x + x.transpose(2, 3), "add .*: it combines 8 columns with 8 rows"),
        (lambda x: x[:, :, :4].mean((2, 3)), "mean .*: it treats 4 rows that do not cover the image as the entire"),
        (lambda x: x + x[:, :, :1], "add .*: it treats 1 rows that do not cover the image as the entire axis"),
        (lambda x: x[:, :, ::2, ::2] + x[:, :, :4, :4], "add .*: branches with strides of 2 and 1 pixels meet"),
        (lambda x: cat(x)[:, :2], "slice .*: it selects channels of concatenated branches"),
        (lambda x: functional.pad(x, (0, 0, 0, 0, 0, 3))[:, 3:], "slice .*: it selects channels of concatenated"),
        (lambda x: functional.pixel_shuffle(cat(x)[:, :8], 2), "pixel_shuffle .*: it turns channels of concatenated"),
        (lambda x: torch.fft.fft(x).real, "fft_r2c .*: no rule for this operation"),
    ],
)
def test_unknown_operations_are_named_and_refused(function: object, reason: str) -> None:
    with pytest.raises(UnknownReceptiveField, match=f"receptive field unknown: {reason}"):
        fields_of(Calls(function), 2, 3, 8, 8)


def test_tensors_overwritten_through_another_view_are_refused() -> None:
    def overwritten(images: Tensor, conv: nn.Module) -> Tensor:
        maps = conv(images)
        maps.view(2, 4, -1).add_(functional.max_pool2d(maps, 3, 1, 1).flatten(2))
        return maps * 2

    with pytest.raises(UnknownReceptiveField, match=r"mul .*: it reads a tensor that was overwritten through another"):
        fields_of(Calls(overwritten, nn.Conv2d(3, 4, 3)), 2, 3, 8, 8)


def test_a_tensor_filled_with_a_number_of_the_image_is_global() -> None:
    def filled(images: Tensor, conv: nn.Module) -> Tensor:
        maps = conv(images)
        return maps / torch.zeros_like(maps).fill_(images.amax())

    assert is_global(last_of(Calls(filled, nn.Conv2d(3, 4, 3)), 2, 3, 8, 8))


def test_padding_does_not_restore_cropped_pixels() -> None:
    def cut(images: Tensor) -> Tensor:
        return functional.pad(images[:, :, 2:-2, 2:-2], (2,) * 4).mean((2, 3))

    with pytest.raises(UnknownReceptiveField, match="it treats 8 rows that do not cover the image"):
        fields_of(Calls(cut), 2, 3, 8, 8)
    assert is_global(last_of(Calls(lambda x: x[:, :, ::2, ::2].mean((2, 3))), 2, 3, 8, 8))


@pytest.mark.parametrize("known_first", [True, False])
def test_a_constant_with_an_unknown_slice_stays_unknown(known_first: bool) -> None:
    def pasted(images: Tensor, conv: nn.Module) -> Tensor:
        canvas, maps = images.new_zeros(2, 3, 8, 8), conv(images)
        above, below = canvas[:, :, :4], canvas[:, :, 4:]
        if known_first:
            below.copy_(maps[:, :, :4])
        above.copy_(images[:, :, :4].flip(2))
        if not known_first:
            below.copy_(maps[:, :, :4])
        return torch.cat([maps, canvas * 2], dim=1)

    traced = trace(Calls(pasted, nn.Conv2d(3, 3, 3, padding=1)), (2, 3, 8, 8))
    fields, unknown = known_fields(traced)
    assert unknown == "receptive field unknown: flip in the network itself: it flips or rolls the map"
    last = {operation.name: axes for operation, axes in zip(traced.operations, fields, strict=True)}
    assert last["convolution"] is not None
    assert (last["mul"], last["cat"]) == (None, None)


def test_views_of_unknown_tensors_are_unknown_and_other_branches_are_known() -> None:
    def branched(images: Tensor, conv: nn.Module) -> Tensor:
        maps = conv(images)
        flat, lost = maps.flatten(2), images.flip(2)
        maps.add_(lost)  # in place, so also in the view
        return torch.cat([flat * 2, conv(images).flatten(2)], dim=1)

    traced = trace(Calls(branched, nn.Conv2d(3, 3, 3, padding=1)), (2, 3, 8, 8))
    fields, _ = known_fields(traced)
    known = [(operation.name, axes is not None) for operation, axes in zip(traced.operations, fields, strict=True)]
    assert ("mul", False) in known
    assert known[-3:] == [("convolution", True), ("view", True), ("cat", False)]


def test_a_network_that_needs_values_is_refused() -> None:
    with pytest.raises(TraceError, match=r"Calls does not run on shapes \(N, C, H, W\) = \(2, 3, 8, 8\)"):
        trace(Calls(lambda x: x if x.sum() > 0 else -x), (2, 3, 8, 8))


def test_modules_used_twice_and_shared_parameters_are_restored() -> None:
    conv, other = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
    other.weight = conv.weight
    net = nn.Sequential(conv, nn.ReLU(), conv, other)
    assert local_fields(last_of(net, 1, 3, 9, 9)) == [(7, 1, 0)] * 2
    assert kept_for_backward(net, (1, 3, 9, 9), precision="32-true") == 4 * 3 * (7 * 7 + 5 * 5)
    assert net[0] is net[2]
    assert net[3].weight is net[0].weight is conv.weight
    assert {parameter.device.type for parameter in net.parameters()} == {"cpu"}


def test_tracing_leaves_a_network_unchanged() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    net[1].eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    traced = trace(net, (2, 3, 8, 8))
    assert traced.outputs is not None
    assert traced.outputs.shape == (2, 4, 6, 6)
    assert [layer.training for layer in net.modules()] == [True, True, False, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in net.modules())
