"""A rule for each torch operation: its outputs' receptive fields from its inputs'. Others are refused, not guessed."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from models.analysis.axes import Factor, TensorAxes, broadcast, meet
from models.analysis.intervals import TapPattern, UnknownReceptiveField
from models.analysis.trace import Operation

Lookup = Callable[[Tensor], TensorAxes | None]  # None for a tensor that does not depend on the images
Rule = Callable[[Operation, TensorAxes], TensorAxes | list[TensorAxes]]  # from the field of the first argument
JointRule = Callable[[Operation, Lookup], TensorAxes | list[TensorAxes]]  # from those of several arguments


def outputs_of(operation: Operation, lookup: Lookup) -> list[TensorAxes | None]:
    """The field of each output, None where it does not depend on the images. Raises: UnknownReceptiveField."""
    inputs = _known(operation.inputs, lookup)
    if not inputs:
        return [None] * len(operation.outputs)
    if not operation.outputs:
        raise UnknownReceptiveField("in-place operation without output")
    if operation.name in RULES:
        fields = RULES[operation.name](operation, _first(operation, lookup))
    elif operation.name in JOINT_RULES:
        fields = JOINT_RULES[operation.name](operation, lookup)
    elif operation.pointwise:
        fields = broadcast(inputs, operation.outputs[0].shape)
    elif any(axes.map_axes() for axes in inputs):
        raise UnknownReceptiveField("no rule for this operation")
    else:  # no map, so positions cannot be read from one another
        fields = [meet(inputs, tuple((Factor(size),) for size in output.shape)) for output in operation.outputs]
    if isinstance(fields, TensorAxes):  # further outputs of the same shape, such as indices, have the same field
        shape = operation.outputs[0].shape
        return [broadcast([fields], shape) if output.shape == shape else None for output in operation.outputs]
    return list(fields)


def _first(operation: Operation, lookup: Lookup) -> TensorAxes:
    axes = lookup(operation.tensor(0))
    if axes is None:
        raise UnknownReceptiveField("the input is constant but its parameters depend on the image")
    return axes


def _known(tensors: Sequence[Tensor], lookup: Lookup) -> list[TensorAxes]:
    return [axes for axes in map(lookup, tensors) if axes is not None]


def slice_start(operation: Operation, size: int) -> int:
    """The first position of a slice of a dimension of this size."""
    start = next(iter(operation.integers("start")), 0)
    return min(start if start >= 0 else max(0, size + start), size)


def _pool(operation: Operation, axes: TensorAxes) -> TensorAxes:
    return _on_map(operation, axes, patterns=_kernels(operation, operation.pair("kernel_size")))


def _kernels(operation: Operation, sizes: Sequence[int]) -> list[TapPattern]:
    """The pattern of a pooling or convolution along each axis of its kernel."""
    taps = TapPattern.transposed if operation.argument("transposed") else TapPattern.kernel
    options = (operation.pair("stride", sizes), operation.pair("padding"), operation.pair("dilation"))
    return [
        taps(size, stride=stride, padding=padding, dilation=dilation)
        for size, stride, padding, dilation in zip(sizes, *options, strict=False)
    ]


def _adaptive_pool(operation: Operation, axes: TensorAxes) -> TensorAxes:
    after = operation.outputs[0].shape
    pooled = axes.made_global([dim for dim in (-2, -1) if after[dim] == 1])
    return _on_map(operation, pooled, patterns=list(map(TapPattern.adaptive, axes.shape[-2:], after[-2:])))


def _resize_nearest(operation: Operation, axes: TensorAxes) -> TensorAxes:
    for scale, before, after in _resized(operation, axes):
        resized = torch.nn.functional.interpolate(torch.arange(float(before))[None, None], after)[0, 0].tolist()
        exact = [position * before // after for position in range(after)]
        if scale not in (None, after / before) or resized != exact:
            raise UnknownReceptiveField(f"it resizes {before} positions to {after} with rounding")
    return _repeat(operation, axes)


def _repeat(operation: Operation, axes: TensorAxes) -> TensorAxes:
    """Spread the positions evenly over more or fewer."""
    after = operation.outputs[0].shape
    return _on_map(operation, axes, patterns=list(map(TapPattern.nearest, axes.shape[-2:], after[-2:])))


def _resize_linear(operation: Operation, axes: TensorAxes) -> TensorAxes:
    corners, patterns = bool(operation.argument("align_corners")), []
    for scale, before, after in _resized(operation, axes):
        if not corners and scale not in (None, after / before):
            raise UnknownReceptiveField(f"it resizes {before} positions to {after} by a factor of {scale}")
        if corners and min(before, after) < 2:
            raise UnknownReceptiveField(f"it aligns the corners of {before} positions with those of {after}")
        patterns.append(TapPattern.linear(before, after, align_corners=corners))
    return _on_map(operation, axes, patterns=patterns)


def _resized(operation: Operation, axes: TensorAxes) -> Iterable[tuple[object, int, int]]:
    """Scale, size before and size after, of rows and columns; the scale is None if only the sizes are given."""
    scales = [operation.argument("scales_h"), operation.argument("scales_w")]
    return zip(scales, axes.shape[-2:], operation.outputs[0].shape[-2:], strict=True)


def _pixel_shuffle(operation: Operation, axes: TensorAxes) -> TensorAxes:
    if axes.is_mixed:
        raise UnknownReceptiveField("it turns channels of concatenated branches into positions")
    return _repeat(operation, axes)


def _pixel_unshuffle(operation: Operation, axes: TensorAxes) -> TensorAxes:
    factor = operation.integer("downscale_factor")
    pattern = TapPattern.kernel(factor, stride=factor)
    return replace(_on_map(operation, axes, patterns=[pattern, pattern]), is_mixed=True)


def _on_map(operation: Operation, axes: TensorAxes, *, patterns: Sequence[TapPattern]) -> TensorAxes:
    """Read the last two dimensions by these patterns; the channels before them may change in number."""
    after = operation.outputs[0].shape
    for dim, pattern in zip((-2, -1), patterns, strict=True):
        axes = axes.along(dim, pattern, size=after[dim])
    if len(after) > 2 and axes.shape[-3] != after[-3]:
        axes = axes.rearranged([*axes.dims[:-3], [Factor(after[-3])], *axes.dims[-2:]])
    return axes


def _pad(operation: Operation, axes: TensorAxes) -> TensorAxes:
    starts = (operation.integers("pad") or operation.integers("padding"))[::2]  # the last dimension first
    for back, start in enumerate(starts, start=1):
        axes = axes.along(-back, TapPattern.slice(-start), size=operation.outputs[0].shape[-back])
    return axes


def _unfold(operation: Operation, axes: TensorAxes) -> TensorAxes:
    size, dim = operation.integer("size"), operation.integer("dimension") % len(axes.dims)
    pattern = TapPattern.kernel(size, stride=operation.integer("step"))
    unfolded = axes.along(dim, pattern, size=operation.outputs[0].shape[dim])
    return replace(unfolded.rearranged([*unfolded.dims, [Factor(size)]]), is_mixed=unfolded.is_mixed or size > 1)


def _transpose(operation: Operation, axes: TensorAxes) -> TensorAxes:
    one, other = (0, 1) if operation.name == "t" else (operation.integer("dim0"), operation.integer("dim1"))
    dims = list(axes.dims)
    dims[one], dims[other] = dims[other], dims[one]
    return axes.rearranged(dims)


def _unsqueeze(operation: Operation, axes: TensorAxes) -> TensorAxes:
    dims = list(axes.dims)
    dims.insert(operation.integer("dim") % (len(dims) + 1), ())
    return axes.rearranged(dims)


def _squeeze(operation: Operation, axes: TensorAxes) -> TensorAxes:
    candidates = operation.integers("dim") or range(len(axes.dims))
    gone = {dim % len(axes.dims) for dim in candidates if axes.shape[dim] == 1}
    return axes.rearranged(dim for position, dim in enumerate(axes.dims) if position not in gone)


def _slice(operation: Operation, axes: TensorAxes) -> TensorAxes:
    dim = operation.integer("dim")
    before, after = axes.shape[dim], operation.outputs[0].shape[dim]
    pattern = TapPattern.slice(slice_start(operation, before), step=operation.integer("step"))
    return axes if after == before else axes.along(dim, pattern, size=after)


def _entries(operation: Operation, axes: TensorAxes) -> list[TensorAxes]:
    """One entry of a dimension, which is removed, for `select`; every entry for `unbind`."""
    dim, indices = operation.integer("dim"), operation.integers("index") or range(len(operation.outputs))
    entries = [axes.along(dim, TapPattern.slice(index % axes.shape[dim]), size=1) for index in indices]
    kept = [position for position in range(len(axes.dims)) if position != dim % len(axes.dims)]
    return [entry.rearranged(entry.dims[position] for position in kept) for entry in entries]


def _split(operation: Operation, axes: TensorAxes) -> list[TensorAxes]:
    dim, start, pieces = operation.integer("dim"), 0, []
    for output in operation.outputs:
        pieces.append(axes.along(dim, TapPattern.slice(start), size=output.shape[dim]))
        start += output.shape[dim]
    return pieces


def _reduction(operation: Operation, axes: TensorAxes) -> TensorAxes:
    gone = {dim % len(axes.dims) for dim in operation.integers("dim") or range(len(axes.dims))}
    ones = {dim: [factor for factor in axes.dims[dim] if factor.size == 1] for dim in gone}
    keeps = bool(operation.argument("keepdim"))
    kept = [ones.get(position, dim) for position, dim in enumerate(axes.dims) if keeps or position not in gone]
    return axes.made_global(gone).rearranged(kept)


def _flip_or_roll(operation: Operation, axes: TensorAxes) -> TensorAxes:
    dims = operation.integers("dims")
    if not dims or any(axes.axis_of(dim) is not None for dim in dims):
        raise UnknownReceptiveField("it flips or rolls the map")
    return axes


def _convolution(operation: Operation, lookup: Lookup) -> TensorAxes:
    kernel, shape = operation.tensor(1), operation.outputs[0].shape
    axes = _first(operation, lookup).made_global([1])
    for dim, pattern in enumerate(_kernels(operation, kernel.shape[2:]), start=2):
        axes = axes.along(dim, pattern, size=shape[dim])
    # Kernels and biases computed from the image act on every position.
    parameters = [one.made_global(range(len(one.dims))) for one in _known(operation.inputs[1:], lookup)]
    result = meet([axes, *parameters], (axes.dims[0], (Factor(shape[1]),), *axes.dims[2:]))
    return result if operation.integer("groups") > 1 else replace(result, is_mixed=False)


def _concatenate(operation: Operation, lookup: Lookup) -> TensorAxes:
    """`cat`, and `stack`, which concatenates along a new dimension."""
    shape = operation.outputs[0].shape
    dim, parts = operation.integer("dim") % len(shape), []
    for axes in _known(operation.inputs, lookup):
        dims = list(axes.dims)
        if operation.name == "stack":
            dims.insert(dim, ())
        if axes.rearranged(dims).axis_of(dim) is not None:
            raise UnknownReceptiveField("it concatenates maps along rows or columns")
        dims[dim] = (Factor(shape[dim]),)
        parts.append(axes.rearranged(dims))
    result = broadcast(parts, shape, concatenated=True)
    if dim == 0 and result.is_mixed:
        raise UnknownReceptiveField("it concatenates batches with different receptive fields")
    return replace(result, is_mixed=result.is_mixed or len(parts) < len(operation.inputs))  # constants read nothing


def _norm(operation: Operation, lookup: Lookup) -> TensorAxes:
    axes = _first(operation, lookup)
    scaled = meet([axes, *_known(operation.inputs[1:], lookup)], axes.dims)  # by scales that may depend on the image
    if operation.name == "native_layer_norm":
        return scaled.normalized(range(-len(operation.integers("normalized_shape")), 0))
    if operation.name == "native_group_norm":
        return scaled.normalized(range(1, len(axes.dims)))
    uses_batch = operation.argument("training") or operation.argument("running_mean") is None
    return scaled.normalized([0, *range(2, len(axes.dims))]) if uses_batch else scaled


def _matrix_product(operation: Operation, lookup: Lookup) -> TensorAxes:
    """Entry (i, j) reads row i of the left factor and column j of the right one."""
    *biases, one, other = operation.inputs
    shape = operation.outputs[0].shape
    left, right = lookup(one), lookup(other)
    left, right = left and left.made_global([-1]), right and right.made_global([-2])
    if left and right and _has_map(left.dims[-2]) and _has_map(right.dims[-1]):  # all pairs of positions: attention
        left, right = left.made_global([-2]), right.made_global([-1])
        right = right.rearranged([*right.dims[:-1], [Factor(shape[-1])]])
    rows = left.dims[-2] if left else (Factor(shape[-2]),)
    columns = right.dims[-1] if right else (Factor(shape[-1]),)
    factors = [axes for axes in (left, right) if axes]
    batches = {axes.dims[:-2] for axes in factors}
    if len(batches) > 1 and any(_has_map(dim) for dims in batches for dim in dims):
        raise UnknownReceptiveField("it multiplies maps at different positions")
    added = [broadcast([axes], shape) for axes in _known(biases, lookup)]
    result = meet([*factors, *added], (*factors[0].dims[:-2], rows, columns))
    # A product with weights sums over all channels, unless they are split into several dimensions, as for heads.
    remaining = [factor for dim in (*result.dims[:-2], rows if left else columns) for factor in dim]
    is_split = sum(factor.axis is None and factor.size > 1 for factor in remaining) > 1
    return replace(result, is_mixed=False) if len(factors) == 1 and not is_split else result


def _has_map(factors: Sequence[Factor]) -> bool:
    return any(factor.is_map for factor in factors)


RULES: dict[str, Rule] = {
    **dict.fromkeys(["max_pool2d_with_indices", "avg_pool2d"], _pool),
    **dict.fromkeys(["adaptive_avg_pool2d", "adaptive_max_pool2d"], _adaptive_pool),
    "upsample_nearest2d": _resize_nearest,
    "upsample_bilinear2d": _resize_linear,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    **dict.fromkeys(["constant_pad_nd", "reflection_pad2d", "replication_pad2d"], _pad),
    "unfold": _unfold,
    **dict.fromkeys(["view", "unsafe_view", "reshape"], lambda one, axes: axes.viewed(one.outputs[0].shape)),
    "permute": lambda one, axes: axes.rearranged(axes.dims[dim] for dim in one.integers("dims")),
    **dict.fromkeys(["transpose", "t"], _transpose),
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "slice": _slice,
    **dict.fromkeys(["select", "unbind"], _entries),
    **dict.fromkeys(["split", "split_with_sizes"], _split),
    **dict.fromkeys(["mean", "sum", "max", "min", "amax", "amin", "var", "std", "linalg_vector_norm"], _reduction),
    **dict.fromkeys(
        ["softmax", "safe_softmax", "log_softmax"], lambda one, axes: axes.made_global(one.integers("dim"))
    ),
    **dict.fromkeys(["roll", "flip"], _flip_or_roll),
}
JOINT_RULES: dict[str, JointRule] = {
    **dict.fromkeys(["convolution", "convolution_overrideable"], _convolution),
    **dict.fromkeys(["cat", "stack"], _concatenate),
    **dict.fromkeys(
        ["native_batch_norm", "native_batch_norm_legit_no_training", "native_layer_norm", "native_group_norm"], _norm
    ),
    **dict.fromkeys(["mm", "bmm", "addmm", "baddbmm"], _matrix_product),
}
