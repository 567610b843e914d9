"""A check of receptive fields: the pixels with a gradient, for one unit of a network made linear and positive.

Weights become positive, norms and activations the identity, maxima sums. No two paths cancel then, so a unit depends on
exactly the pixels where its gradient is not zero. Kernels, strides and offsets enter only through torch itself; the
propagated fields select the paths to compare.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from models.analysis.axes import AXES, AXIS_NAMES, COLUMNS, ROWS, TensorAxes
from models.analysis.intervals import AxisField, Interval, UnknownReceptiveField
from models.analysis.receptive_field import receptive_fields
from models.analysis.trace import Operation, Trace, TraceError, trace

ACROSS = 64  # pixels along the axis that is not compared
MARGIN = 12  # positions that fit beside the receptive field, so that no border is near
MAX_UNITS = 8  # neighbouring units that are compared
Fields = Sequence[TensorAxes | None]  # one per operation


class FieldComparison(NamedTuple):
    """The pixels that a unit in the middle of a map reads along one axis: by propagation and by gradient."""

    layer: str
    axis: str
    propagated: Interval | None
    gradient: Interval | None
    image_side: int

    @property
    def is_inside(self) -> bool:
        """Whether the field lies inside the image; outside, padding on the way may hide pixels of it."""
        return self.propagated is None or (self.propagated[0] >= 0 and self.propagated[1] < self.image_side)

    @property
    def agrees(self) -> bool:
        """Whether both are equal, or, for a field that leaves the image, the gradient lies within it."""
        if self.is_inside or self.propagated is None or self.gradient is None:
            return self.propagated == self.gradient
        return self.propagated[0] <= self.gradient[0] and self.gradient[1] <= self.propagated[1]

    def to_dict(self) -> dict[str, object]:
        """The comparison for a JSON file."""
        names = ("layer", "axis", "field", "gradient", "image", "agrees")
        return dict(zip(names, (*self, self.agrees), strict=True))


class LinearNetwork:
    """A traced network with everything linear and positive, in float64, and the outputs of some of its operations.

    With the fields of all operations, paths that read an entire axis at once (means, gates, attention) are cut, those
    of kernels along `axis` remain. Raises: UnknownReceptiveField for an operation without a linear, positive form.
    """

    def __init__(
        self, traced: Trace, observed: Collection[int], *, fields: Fields | None = None, axis: int = ROWS
    ) -> None:
        self.images = torch.ones(traced.images.shape, dtype=torch.float64, requires_grad=True)
        self.outputs: dict[int, Tensor] = {}  # of the observed operations, by position
        self._values: dict[int, Tensor] = {id(traced.images): self.images}  # of tensors that depend on the images
        self._local = {id(traced.images)}  # tensors with a local field along the axis
        self._cuts_global_paths, fields = fields is not None, fields or [None] * len(traced.operations)
        last_use = {id(tensor): position for position, one in enumerate(traced.operations) for tensor in one.inputs}
        for position, operation in enumerate(traced.operations[: max(observed) + 1]):
            inputs = [id(tensor) for tensor in operation.inputs]
            if not any(key in self._values for key in inputs):
                continue
            axes = fields[position]
            self._execute(operation, None if axes is None else axes.fields[axis])
            if position in observed:
                self.outputs[position] = self._values[id(operation.outputs[0])]
            for key in inputs:  # free what no later operation reads
                if last_use[key] == position and key not in map(id, operation.outputs):
                    self._values.pop(key, None)

    def extent(self, position: int, index: int, *, dim: int) -> tuple[Interval | None, Interval | None]:
        """Rows and columns with a gradient of entry `index` along a dimension of the first output of an operation."""
        output = self.outputs[position]
        if not output.requires_grad:
            return None, None
        (gradient,) = torch.autograd.grad(output.select(dim, index).sum(), self.images, retain_graph=True)
        touched = gradient.ne(0).any(1).any(0)  # (N, C, H, W) -> (H, W)
        return _span(touched.any(1)), _span(touched.any(0))

    def _execute(self, operation: Operation, field: AxisField | None) -> None:
        """Compute the outputs of an operation; constants where a local path enters one that reads the entire axis."""
        is_local = field is not None and field.has_local_path
        is_cut = field is not None and not is_local and any(id(tensor) in self._local for tensor in operation.inputs)
        for output, result in zip(operation.outputs, self._run(operation), strict=True):
            self._values[id(output)] = torch.ones_like(result) if is_cut else result
            if is_local:
                self._local.add(id(output))

    def _run(self, operation: Operation) -> list[Tensor]:
        name, output = operation.name, operation.outputs[0]
        writes_part = operation.in_place and output.numel() * output.element_size() < output.untyped_storage().nbytes()
        inputs = [self._values[id(tensor)] for tensor in operation.inputs if id(tensor) in self._values]
        if name in PRODUCTS and len(inputs) > 1:
            result = _sum_of_products(operation, [self._values.get(id(factor)) for factor in operation.inputs[-2:]])
        elif name in LINEAR:
            arguments, options = tree_map_only(Tensor, self._value, (list(operation.args), dict(operation.kwargs)))
            result = operation.function(*arguments, **options)
        elif name in SUBSTITUTES:
            result = SUBSTITUTES[name](operation, inputs[0])
        elif name in STATISTICS:
            result = inputs[0] if self._cuts_global_paths else inputs[0] + inputs[0].mean()
        elif operation.pointwise and not writes_part:
            result = functools.reduce(torch.add, [value.expand(output.shape) for value in inputs])
        else:
            reason = "it writes to a part of a tensor" if writes_part else "no linear form of this operation"
            raise UnknownReceptiveField(f"gradient unknown: {operation.location}: {reason}")
        return list(result) if isinstance(result, list | tuple) else [result] * len(operation.outputs)

    def _value(self, tensor: Tensor) -> Tensor:
        """The recorded value of a tensor; weights are equal, with sum 1 over input channels: nothing overflows."""
        value = 1 / tensor.shape[1] if tensor.ndim == 4 else 1.0
        weights = torch.full((1,) * tensor.ndim, value, dtype=torch.float64).expand(tensor.shape)
        return self._values.get(id(tensor), weights)


def compare_with_gradient(net: nn.Module, shape: tuple[int, int, int, int]) -> list[FieldComparison]:
    """Compare propagated fields and gradients at the end of every resolution, along rows and along columns.

    `shape` is (N, C, H, W); images are enlarged beyond the field if the network allows. Raises: UnknownReceptiveField.
    """
    comparisons = []
    for axis in AXES:
        traced = _enlarged(net, shape, axis=axis)
        fields = receptive_fields(traced)
        ends = _ends_of_resolutions(fields, axis=axis)
        linear = LinearNetwork(traced, ends.keys(), fields=fields, axis=axis)
        for position, (dim, field) in ends.items():
            layer, middle = traced.operations[position].layer, field.num_positions // 2
            for unit in range(middle, min(field.num_positions, middle + min(MAX_UNITS, len(field.phases)))):
                gradient = linear.extent(position, unit, dim=dim)[axis]
                comparisons.append(FieldComparison(layer, AXIS_NAMES[axis], field.at(unit), gradient, field.image_side))
    return comparisons


def _enlarged(net: nn.Module, shape: tuple[int, int, int, int], *, axis: int) -> Trace:
    """A trace of one image that exceeds the largest field along the axis and is narrow across, if the net allows it."""
    original = trace(net, shape)
    fields = receptive_fields(original)
    *_, (last, axes) = [(place, one) for place, one in enumerate(fields) if one is not None and one.has_local_field]
    field = axes.fields[axis]
    margin = math.ceil((MARGIN + 2 * min(len(field.phases), MAX_UNITS)) * field.stride)
    along = max(shape[2 + axis], -(-(field.size + margin) // ACROSS) * ACROSS)
    for across in (ACROSS, shape[3 - axis]):
        sides = (along, across) if axis == ROWS else (across, along)
        for until in (None, original.operations[last].layer):
            try:
                return trace(net, (1, shape[1], *sides), until=until or None)
            except TraceError:
                continue
    return original


def _ends_of_resolutions(fields: Fields, *, axis: int) -> dict[int, tuple[int, AxisField]]:
    """The last operation with a local field on each size of the map: dimension of the axis in its output, and field."""
    ends: dict[int, tuple[int, tuple[int, AxisField]]] = {}
    for position, axes in enumerate(fields):
        if axes is None or not axes.fields[axis].has_local_path:
            continue
        dims = [dim for dim, factors in enumerate(axes.dims) if [factor.axis for factor in factors] == [axis]]
        if dims:
            ends[axes.fields[axis].num_positions] = (position, (dims[0], axes.fields[axis]))
    return dict(ends.values())


def _span(touched: Tensor) -> Interval | None:
    positions = touched.nonzero()
    return (int(positions[0]), int(positions[-1])) if len(positions) else None


def _pooling_sums(operation: Operation, images: Tensor) -> Tensor:
    kernel, padding, dilation = (operation.pair(name) for name in ("kernel_size", "padding", "dilation"))
    stride, shape = operation.pair("stride", kernel), operation.outputs[0].shape
    after = [padding[axis] + stride[axis] for axis in AXES]  # a stride more in ceil mode
    padded = functional.pad(images, (padding[COLUMNS], after[COLUMNS], padding[ROWS], after[ROWS]))
    ones = torch.ones(1, 1, *kernel, dtype=images.dtype)
    single = padded.reshape(-1, 1, *padded.shape[-2:])  # (N, C, H, W) -> (N C, 1, H, W)
    sums = functional.conv2d(single, ones, stride=stride, dilation=dilation)
    return sums[..., : shape[-2], : shape[-1]].reshape(shape)


def _sum_of_products(operation: Operation, factors: list[Tensor | None]) -> Tensor:
    """The product of two image-dependent factors as the sum of each with ones: squares would overflow in depth."""
    one, other = factors
    left, right = (torch.ones(factor.shape, dtype=torch.float64) for factor in operation.inputs[-2:])
    if one is None or other is None:
        return (left if one is None else one) @ (right if other is None else other)
    return one @ right + left @ other


def _adaptive_means(operation: Operation, images: Tensor) -> Tensor:
    *_, height, width = operation.outputs[0].shape
    return functional.adaptive_avg_pool2d(images, (height, width))


def _mean_over(operation: Operation, images: Tensor) -> Tensor:
    return images.mean(operation.integers("dim"), keepdim=bool(operation.argument("keepdim")))


PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}
STATISTICS = {"native_group_norm"}  # norms with statistics over the map
# In place, `as_strided` changes the memory layout of a tensor only.
IDENTITIES = {"native_batch_norm", "native_batch_norm_legit_no_training", "native_layer_norm", "as_strided"}
LINEAR = PRODUCTS | {  # operations that run as they are
    "convolution", "avg_pool2d", "adaptive_avg_pool2d", "mean", "sum", "cat", "stack", "permute", "transpose", "t",
    "unsqueeze", "squeeze", "slice", "select", "split", "split_with_sizes", "unbind", "unfold", "roll", "flip",
    "constant_pad_nd", "reflection_pad2d", "replication_pad2d", "upsample_nearest2d", "upsample_bilinear2d",
    "pixel_shuffle", "pixel_unshuffle",
}  # fmt: skip
SUBSTITUTES: Mapping[str, Callable[[Operation, Tensor], Tensor]] = {
    "max_pool2d_with_indices": _pooling_sums,
    "adaptive_max_pool2d": _adaptive_means,
    **dict.fromkeys(["amax", "amin", "var", "std", "linalg_vector_norm"], _mean_over),
    **dict.fromkeys(
        ["softmax", "safe_softmax", "log_softmax"],
        lambda one, images: images + images.mean(one.integers("dim"), keepdim=True),
    ),
    **dict.fromkeys(IDENTITIES, lambda _, images: images),
    # Memory layouts may differ here, so views are reshapes.
    **dict.fromkeys(["view", "unsafe_view"], lambda one, images: images.reshape(one.outputs[0].shape)),
}
