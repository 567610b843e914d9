"""The receptive field a second way: the extent of the gradient of one output with respect to the image.

The network's own operations run on real numbers, with everything made linear and positive, so that no two paths cancel:
every weight is positive, norms and activations pass on what they get, maxima become sums of their windows. What then
has a gradient is what the output depends on. Nothing here knows of kernels, strides or offsets but torch itself; only
where a path sees the whole image, and is left out of the comparison, is taken from the propagated fields.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from models.analysis.axes import AXES, COLUMNS, NAMES, ROWS, Sight, UnknownReceptiveField
from models.analysis.intervals import Interval
from models.analysis.receptive_field import receptive_fields
from models.analysis.trace import Operation, Trace, Untraceable, trace

NARROW = 64  # pixels of the side that is not looked at
SPARE = 12  # positions of the other that fit beside the receptive field, so that no border is near
PHASES = 8  # units next to each other that are compared at most


class Extent(NamedTuple):
    """First and last row, first and last column with a gradient; None where nothing has one."""

    rows: Interval | None
    columns: Interval | None


class Comparison(NamedTuple):
    """One unit in the middle of a map: the pixels that it reads by propagation and by gradient, along one axis."""

    layer: str
    axis: str
    field: Interval | None
    gradient: Interval | None
    image: int

    @property
    def inside(self) -> bool:
        """Whether the field ends inside the image; where it does not, padding on the way may hide pixels of it."""
        return self.field is None or (self.field[0] >= 0 and self.field[1] < self.image)

    @property
    def agrees(self) -> bool:
        """Whether both ways lead to the same pixels, or, where the field leaves the image, to none beside it."""
        if self.inside or self.field is None or self.gradient is None:
            return self.field == self.gradient
        return self.field[0] <= self.gradient[0] and self.gradient[1] <= self.field[1]


class Linear:
    """A traced network with everything linear and positive, in float64, of whose operations some are to be looked at.

    Without `cut`, the sights of its operations, all paths are followed. With it, those that see the whole of an axis at
    once (means, gates, attention) are left out, and the paths made of windows along it remain.

    Raises: UnknownReceptiveField for an operation that is not known to keep a gradient positive.
    """

    def __init__(
        self, traced: Trace, looked_at: Collection[int], *, cut: Sequence[Sight | None] | None = None, axis: int = ROWS
    ) -> None:
        self.images = torch.ones(traced.images.shape, dtype=torch.float64, requires_grad=True)
        self.outputs: dict[int, Tensor] = {}  # of the operations looked at
        self._numbers: dict[int, Tensor] = {id(traced.images): self.images}  # of tensors that depend on the images
        self._cut = cut is not None
        last_use = {id(tensor): place for place, one in enumerate(traced.operations) for tensor in one.inputs}
        local = {id(traced.images)}
        for position, operation in enumerate(traced.operations[: max(looked_at) + 1]):
            inputs = [id(tensor) for tensor in operation.inputs]
            if not any(key in self._numbers for key in inputs):
                continue
            sight = cut[position] if cut is not None else None
            followed = sight is not None and sight.axes[axis].field is not None
            ends = sight is not None and not followed and any(key in local for key in inputs)
            for output, result in zip(operation.outputs, self._run(operation), strict=True):
                self._numbers[id(output)] = torch.ones_like(result) if ends else result
                if followed:
                    local.add(id(output))
            if position in looked_at:
                self.outputs[position] = self._numbers[id(operation.outputs[0])]
            for key in inputs:
                if last_use[key] == position and key not in map(id, operation.outputs):
                    self._numbers.pop(key, None)

    def extent(self, position: int, place: int, *, dim: int) -> Extent:
        """On which pixels depends what lies at a place along a dimension of the first output of an operation."""
        output = self.outputs[position]
        if not output.requires_grad:
            return Extent(None, None)
        (gradient,) = torch.autograd.grad(output.select(dim, place).sum(), self.images, retain_graph=True)
        touched = gradient.ne(0).any(1).any(0)  # (N, C, H, W) -> (H, W)
        return Extent(_span(touched.any(1)), _span(touched.any(0)))

    def _run(self, operation: Operation) -> list[Tensor]:
        name, shape = operation.name, operation.outputs[0].shape
        images = [self._numbers[id(tensor)] for tensor in operation.inputs if id(tensor) in self._numbers]
        if name in PRODUCTS and len(images) > 1:
            result = _each_alone(operation, [self._numbers.get(id(factor)) for factor in operation.inputs[-2:]])
        elif name in LINEAR:
            arguments, options = tree_map(self._real, (list(operation.args), dict(operation.kwargs)))
            result = operation.function(*arguments, **options)
            return list(result) if isinstance(result, list | tuple) else [result]
        elif name in SUBSTITUTES:
            result = SUBSTITUTES[name](operation, images[0])
        elif name in STATISTICS:
            result = images[0] if self._cut else images[0] + images[0].mean()
        elif operation.in_place and shape.numel() * operation.outputs[0].element_size() < _memory(operation.outputs[0]):
            raise UnknownReceptiveField(f"gradient unknown: {operation.where}: it writes into a part of a tensor")
        elif operation.pointwise:
            result = functools.reduce(torch.add, [image.expand(shape) for image in images])
        else:
            raise UnknownReceptiveField(f"gradient unknown: {operation.where}: there is no linear form of it")
        return [result] * len(operation.outputs)

    def _real(self, argument: object) -> object:
        if not isinstance(argument, Tensor):
            return argument
        return self._numbers.get(id(argument), _positive(argument.shape))


def check(net: nn.Module, shape: tuple[int, int, int, int]) -> list[Comparison]:
    """Compare both ways to the receptive field, at the end of every resolution, along rows and along columns.

    `shape` is that of a batch which the network takes, (N, C, H, W). The images are made larger than the field where
    the network takes such; where not, both ways end at their borders.
    Raises: UnknownReceptiveField.
    """
    return [comparison for axis in AXES for comparison in _check_along(net, shape, axis=axis)]


def _check_along(net: nn.Module, shape: tuple[int, int, int, int], *, axis: int) -> list[Comparison]:
    traced = _grown(net, shape, axis=axis)
    sights = receptive_fields(traced)
    ends = _ends_of_resolutions(traced, sights, axis=axis)
    linear = Linear(traced, ends.keys(), cut=sights, axis=axis)
    comparisons = []
    for position, dim in ends.items():
        sight = sights[position]
        assert sight is not None
        seen = sight.axes[axis]
        assert seen.field is not None
        middle = seen.count // 2
        for place in range(middle, min(seen.count, middle + min(PHASES, seen.field.period))):
            gradient = linear.extent(position, place, dim=dim)[axis]
            layer, field = traced.operations[position].layer, seen.field.at(place)
            comparisons.append(Comparison(layer, NAMES[axis], field, gradient, seen.image))
    return comparisons


def _grown(net: nn.Module, shape: tuple[int, int, int, int], *, axis: int) -> Trace:
    """A run on one image, long along the axis for the largest field and narrow across, as far as the net allows."""
    first = trace(net, shape)
    sights = receptive_fields(first)
    last = max(position for position, sight in enumerate(sights) if sight is not None and sight.local)
    sight = sights[last]
    assert sight is not None
    field = sight.axes[axis].field
    assert field is not None
    beside = math.ceil(SPARE * field.jump) + 2 * field.advance
    long = max(shape[2 + axis], -(-(field.size + beside) // NARROW) * NARROW)
    for across in (NARROW, shape[3 - axis]):
        sides = (long, across) if axis == ROWS else (across, long)
        for until in (None, first.operations[last].layer):
            try:
                return trace(net, (1, shape[1], *sides), until=until or None)
            except Untraceable:
                continue
    return first


def _ends_of_resolutions(traced: Trace, sights: Sequence[Sight | None], *, axis: int) -> dict[int, int]:
    """The last operation on each size of a map that is reached through windows, and its dimension along the axis."""
    ends: dict[int, tuple[int, int]] = {}
    for position, sight in enumerate(sights):
        if sight is None or sight.axes[axis].field is None:
            continue
        dims = [dim for dim, parts in enumerate(sight.dims) if [part.axis for part in parts] == [axis]]
        if dims:
            ends[sight.axes[axis].count] = (position, dims[0])
    return dict(ends.values())


def _positive(shape: Sequence[int]) -> Tensor:
    """Equal weights that come to 1 over the channels they mix: no sum of hundreds of layers overflows or vanishes."""
    return torch.full((1,) * len(shape), 1 / shape[1] if len(shape) == 4 else 1.0, dtype=torch.float64).expand(shape)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _span(touched: Tensor) -> Interval | None:
    places = touched.nonzero()
    return (int(places[0]), int(places[-1])) if len(places) else None


def _window_sums(operation: Operation, images: Tensor) -> Tensor:
    """The sum over each window of a pooling, for its maximum."""
    kernel, padding, dilation = (operation.pair(name) for name in ("kernel_size", "padding", "dilation"))
    stride = operation.pair("stride", kernel)
    counts = operation.outputs[0].shape[-2:]
    spans = [(count - 1) * stride[axis] + (kernel[axis] - 1) * dilation[axis] + 1 for axis, count in enumerate(counts)]
    after = [max(0, spans[axis] - padding[axis] - images.shape[axis - 2]) for axis in AXES]  # more in ceil mode
    padded = functional.pad(images, (padding[COLUMNS], after[COLUMNS], padding[ROWS], after[ROWS]))
    ones = torch.ones(1, 1, *kernel, dtype=images.dtype)
    single = padded.reshape(-1, 1, *padded.shape[-2:])
    sums = functional.conv2d(single, ones, stride=stride, dilation=dilation)
    return sums[..., : counts[ROWS], : counts[COLUMNS]].reshape(operation.outputs[0].shape)


def _adaptive_means(operation: Operation, images: Tensor) -> Tensor:
    height, width = operation.outputs[0].shape[-2:]
    return functional.adaptive_avg_pool2d(images, (height, width))


def _each_alone(operation: Operation, factors: list[Tensor | None]) -> Tensor:
    """A product of two that depend on the images, as the sum of each with ones, lest numbers square and square."""
    one, other = factors
    left, right = (torch.ones(factor.shape, dtype=torch.float64) for factor in operation.inputs[-2:])
    products = [*([] if one is None else [one @ right]), *([] if other is None else [left @ other])]
    return functools.reduce(torch.add, products)


def _over(operation: Operation, images: Tensor) -> Tensor:
    """The mean of what a reduction takes one of, or measures."""
    return images.mean(operation.numbers("dim"), keepdim=bool(operation.given("keepdim")))


def _with_others(operation: Operation, images: Tensor) -> Tensor:
    """Itself and what it competes with in a softmax."""
    return images + images.mean(operation.numbers("dim"), keepdim=True)


def _reshaped(operation: Operation, images: Tensor) -> Tensor:
    """A view, whose memory here may lie otherwise than there."""
    return images.reshape(operation.outputs[0].shape)


def _same(operation: Operation, images: Tensor) -> Tensor:
    return images


PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}
# Linear as they are.
LINEAR = PRODUCTS | {
    "convolution", "avg_pool2d", "adaptive_avg_pool2d", "mean", "sum", "cat", "stack", "permute", "transpose", "t",
    "unsqueeze", "squeeze", "slice", "select", "split", "split_with_sizes", "unbind", "unfold", "roll", "flip",
    "constant_pad_nd", "reflection_pad2d", "replication_pad2d", "upsample_nearest2d", "upsample_bilinear2d",
    "pixel_shuffle", "pixel_unshuffle",
}  # fmt: skip
# What stands for those that are not.
SUBSTITUTES: Mapping[str, Callable[[Operation, Tensor], Tensor]] = {
    "max_pool2d_with_indices": _window_sums,
    "adaptive_max_pool2d": _adaptive_means,
    **dict.fromkeys(["amax", "amin", "var", "std", "linalg_vector_norm"], _over),
    **dict.fromkeys(["softmax", "safe_softmax", "log_softmax"], _with_others),
    **dict.fromkeys(["native_batch_norm", "native_batch_norm_legit_no_training", "native_layer_norm"], _same),
    **dict.fromkeys(["view", "unsafe_view"], _reshaped),
    "as_strided": _same,  # in place: of the memory, not of the tensor
}
# Norms whose statistics are taken over the map.
STATISTICS = {"native_group_norm"}
