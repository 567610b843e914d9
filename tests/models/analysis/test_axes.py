"""Receptive fields through layouts, slices, gates and products, against outputs that change with a row or column."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from models.analysis.axes import AXES, TensorAxes
from models.analysis.intervals import UnknownReceptiveField
from models.analysis.receptive_field import receptive_fields
from models.analysis.trace import TraceError, trace

SIDE, CHANNELS = 22, 4
Step = Callable[[Tensor], Tensor]


def weights(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1


def conv(kernel: tuple[int, int], *, groups: int = 1, stride: int = 1) -> Step:
    def step(x: Tensor) -> Tensor:
        kernels = weights(x.shape[1], x.shape[1] // groups, *kernel).to(x)
        return functional.conv2d(x, kernels, padding="same" if stride == 1 else 0, groups=groups, stride=stride)

    return step


def pasted(x: Tensor, region: tuple[slice, ...], canvas: Tensor) -> Tensor:
    canvas[region] = x
    return canvas


def shuffled(x: Tensor) -> Tensor:
    return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def attended(x: Tensor) -> Tensor:
    tokens = x.flatten(2)
    return x + (torch.softmax(tokens.mT @ tokens, dim=-1) @ tokens.mT).mT.reshape(x.shape)


def along_columns(x: Tensor) -> Tensor:
    lines = x.permute(0, 2, 3, 1)  # (N, H, W, C)
    return (torch.softmax(lines @ lines.mT, -1) @ conv((3, 3))(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def added_in_place(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, 1:-1].add_(functional.avg_pool2d(x, 3, 1, 1)[:, :, 1:-1])
    return x


def two_heads(x: Tensor) -> Tensor:
    pooled = functional.avg_pool2d(x, 3, 1, 1)
    return conv((1, 1))(torch.cat([x, pooled], dim=0)).chunk(2, dim=0)[0]


STEPS: dict[str, Step] = {
    "conv 3x3": conv((3, 3)),
    "conv 1x5": conv((1, 5)),
    "conv stride 2": conv((3, 1), stride=2),
    "conv in groups": conv((3, 3), groups=2),
    "pointwise": conv((1, 1)),
    "average pooling": lambda x: functional.avg_pool2d(x, 2),
    "linear": lambda x: functional.linear(x.movedim(1, 3), weights(x.shape[1], x.shape[1]).to(x)).movedim(3, 1),
    "transposed conv": lambda x: functional.conv_transpose2d(x, weights(x.shape[1], CHANNELS, 3, 2).to(x), stride=2),
    "nearest": lambda x: functional.interpolate(x, scale_factor=2),
    "first channels": lambda x: torch.cat([x.chunk(2, dim=1)[0]] * 2, dim=1),
    "last channels": lambda x: torch.cat([x[:, -2:], x[:, -2:]], dim=1),
    "cat": lambda x: torch.cat([x[:, :2], functional.avg_pool2d(x, 3, 1, 1)[:, 2:]], dim=1),
    "constants": lambda x: torch.cat([x[:, :2], torch.ones_like(x[:, :2])], dim=1),
    "channel shuffle": shuffled,
    "flipped channels": lambda x: x.flip(1),
    "rolled": lambda x: torch.roll(x, 1),
    "cropped": lambda x: x[:, :, 1:, :-2],
    "every other": lambda x: x[:, :, ::2, 1::2],
    "upper half": lambda x: x[:, :, : x.shape[2] // 2],
    "gate": lambda x: x * x.mean((2, 3), keepdim=True),
    "strip": lambda x: x * conv((1, 5))(x.mean(2, keepdim=True)),
    "one row": lambda x: x + x[:, :, 3].unsqueeze(2),
    "one pixel": lambda x: x + x[:, :, 2:3, 2:3].flatten(1)[:, :, None, None],
    "outer": lambda x: (x.unsqueeze(-1) * x.unsqueeze(-2))[..., 0],
    "in place": added_in_place,
    "padded": lambda x: functional.pad(x, (1, 2, 0, 1)),
    "on a canvas": lambda x: pasted(x, (..., slice(2, None), slice(-x.shape[3], None)), x.new_zeros(
        *x.shape[:2], x.shape[2] + 2, x.shape[3] + 1)),
    "on a canvas, strided": lambda x: pasted(x, (..., slice(None, None, 2), slice(None)), x.new_zeros(
        *x.shape[:2], 2 * x.shape[2], x.shape[3])),
    "group norm": lambda x: functional.group_norm(x, 1),
    "line norm": lambda x: functional.layer_norm(x, x.shape[3:]),
    "computed scale": lambda x: functional.layer_norm(x.movedim(1, 3), x.shape[1:2], x.mean((0, 2, 3))).movedim(3, 1),
    "softmax": lambda x: torch.softmax(x, dim=3),
    "attended": attended,
    "along columns": along_columns,
    "two heads": two_heads,
    "pixel unshuffle": lambda x: functional.pixel_unshuffle(x, 2)[:, :CHANNELS],
    "unshuffle and shuffle": lambda x: functional.pixel_shuffle(functional.pixel_unshuffle(x, 2), 2),
    "unfolded": lambda x: x.unfold(2, 3, 1)[..., 1],
    "overwritten": lambda x: functional.avg_pool2d(x, 3, 1, 1).copy_(x),
    "computed kernel": lambda x: functional.conv2d(x, x[:1, :, :3, :3].expand(CHANNELS, -1, -1, -1)),
}  # fmt: skip


class Steps(nn.Module):
    """Steps by name, in a row."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = STEPS[name](x)
        return x


def changed_by(net: nn.Module, images: Tensor, *, axis: int) -> Tensor:
    """Which entries of the output change with each row or column of the images: (SIDE, *output)."""
    original = net(images.clone())
    changes = []
    for position in range(SIDE):
        other = images.clone()
        other.select(2 + axis, position).add_(weights(*other.select(2 + axis, position).shape) * 9)
        changes.append(net(other) != original)
    return torch.stack(changes)


def assert_true(axes: TensorAxes, changes: Tensor, *, axis: int) -> None:
    """No position reads pixels outside its field, and one well inside the image reads both ends of it."""
    field = axes.fields[axis]
    dims = [dim for dim, factors in enumerate(axes.dims) if [factor.axis for factor in factors] == [axis]]
    if not dims or axes.dims[dims[0]][0].size == 1:
        return
    by_position = changes.movedim(dims[0] + 1, 1).flatten(2).any(2)  # (SIDE, positions)
    for position in range(by_position.shape[1]):
        read = by_position[:, position].nonzero().flatten().tolist()
        local = field.at(position)
        if field.is_global:
            assert local is None or not read or read[0] <= max(0, local[0]) or read[-1] >= min(SIDE - 1, local[1])
        elif read:
            assert local is not None, (position, read)
            assert local[0] <= read[0], (position, local, read)
            assert read[-1] <= local[1], (position, local, read)
        in_middle = field.num_positions // 3 <= position < field.num_positions - field.num_positions // 3
        if local is not None and not field.is_global and in_middle and 6 <= local[0] <= local[1] < SIDE - 6:
            assert (read[0], read[-1]) == local if read else False, (position, local, read)


@settings(max_examples=400, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4))
def test_fields_are_the_pixels_that_change_a_unit_or_refused(names: list[str]) -> None:
    net = Steps(names)
    shape = (2, CHANNELS, SIDE, SIDE)
    try:
        traced = trace(net, shape)
        fields = receptive_fields(traced)
    except TraceError:
        reject()
    except UnknownReceptiveField:
        return
    sources = [
        position for position, one in enumerate(traced.operations) if any(out is traced.outputs for out in one.outputs)
    ]
    axes = fields[sources[-1]] if sources else None
    for axis in AXES:
        changes = changed_by(net, weights(*shape), axis=axis)
        if axes is not None:
            assert_true(axes, changes, axis=axis)


def test_most_steps_are_followed_and_the_others_refused() -> None:
    refused = set()
    for name in STEPS:
        try:
            receptive_fields(trace(Steps([name]), (2, CHANNELS, SIDE, SIDE)))
        except UnknownReceptiveField:
            refused.add(name)
    assert refused == {
        "rolled", "one row", "one pixel", "outer", "in place", "on a canvas, strided", "computed kernel", "two heads",
        "pixel unshuffle", "unshuffle and shuffle", "unfolded",
    }  # fmt: skip
