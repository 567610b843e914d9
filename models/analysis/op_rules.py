"""How one operation of torch reads its input: a rule for each, from which its receptive field follows.

What has no rule is named and refused: a wrong field is worse than none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from models.analysis.axes import Part, Sight, UnknownReceptiveField, broadcast, meet
from models.analysis.intervals import Reading, adaptive, linear, nearest, steps, transposed, window
from models.analysis.trace import Operation

See = Callable[[Tensor], Sight | None]
Rule = Callable[[Operation, See], Sight | list[Sight]]


def outputs_of(operation: Operation, see: See) -> list[Sight | None]:
    """What each output of an operation sees, None where it does not depend on the images; `see` tells it of an input.

    Raises: UnknownReceptiveField for an operation without a rule, or what its rule does not take.
    """
    if not _all_seen(operation.inputs, see):
        return [None] * len(operation.outputs)
    if not operation.outputs:
        raise UnknownReceptiveField("it puts nothing out, but writes into what it is given")
    rule = RULES.get(operation.name, _pointwise if operation.pointwise else _nowhere)
    sights = rule(operation, see)
    if isinstance(sights, Sight):  # indices beside it see the same
        shape = operation.outputs[0].shape
        return [broadcast([sights], shape) if output.shape == shape else None for output in operation.outputs]
    return list(sights)


def _seen(operation: Operation, see: See) -> Sight:
    """What the tensor in first place sees. Raises: UnknownReceptiveField where only others depend on the images."""
    sight = see(operation.tensor(0))
    if sight is None:
        raise UnknownReceptiveField("what it is applied to does not depend on the image, but how it is does")
    return sight


def _all_seen(tensors: Sequence[Tensor], see: See) -> list[Sight]:
    return [sight for tensor in tensors if (sight := see(tensor)) is not None]


def _pointwise(operation: Operation, see: See) -> Sight:
    return broadcast(_all_seen(operation.inputs, see), operation.outputs[0].shape)


def _nowhere(operation: Operation, see: See) -> list[Sight]:
    """Where no map is left, nothing can be read from elsewhere in it."""
    sights = _all_seen(operation.inputs, see)
    if any(part.axis is not None and part.size > 1 for sight in sights for dim in sight.dims for part in dim):
        raise UnknownReceptiveField("there is no rule for it")
    return [meet(sights, tuple((Part(size),) for size in output.shape)) for output in operation.outputs]


def _convolution(operation: Operation, see: See) -> Sight:
    kernel, shape = operation.tensor(1), operation.outputs[0].shape
    reads = transposed if operation.given("transposed") else window
    sight = _seen(operation, see).seeing_all([1])
    options = zip(*(operation.pair(name) for name in ("stride", "padding", "dilation")), strict=True)
    for dim, (stride, padding, dilation) in zip(range(2, len(shape)), options, strict=False):
        reading = reads(kernel.shape[dim], stride=stride, padding=padding, dilation=dilation)
        sight = sight.along(dim, reading, count=shape[dim])
    made = _all_seen(operation.inputs[1:], see)  # a kernel or bias made of the image, the same for each position
    others = [one.seeing_all(range(len(one.dims))) for one in made]
    behind = meet([sight, *others], (sight.dims[0], (Part(shape[1]),), *sight.dims[2:]))
    return behind if operation.number("groups") > 1 else replace(behind, mixture=False)


def _pool(operation: Operation, see: See) -> Sight:
    kernel = operation.pair("kernel_size")
    stride, padding = operation.pair("stride", kernel), operation.pair("padding")
    dilation = operation.pair("dilation")  # averages have none
    readings = [
        window(size, stride=step, padding=edge, dilation=gap)
        for size, step, edge, gap in zip(kernel, stride, padding, dilation, strict=True)
    ]
    return _on_map(operation, see, read=lambda axis, before, after: readings[axis])


def _adaptive_pool(operation: Operation, see: See) -> Sight:
    sight, after = _seen(operation, see), operation.outputs[0].shape
    means = [dim for dim in (len(after) - 2, len(after) - 1) if after[dim] == 1]
    whole = sight.seeing_all(means)
    for dim in (len(after) - 2, len(after) - 1):
        whole = whole.along(dim, adaptive(sight.shape[dim], after[dim]), count=after[dim])
    return whole


def _resize(operation: Operation, see: See) -> Sight:
    before, after = _seen(operation, see).shape[-2:], operation.outputs[0].shape[-2:]
    for scale, old, new in zip(_scales(operation), before, after, strict=True):
        rows = torch.nn.functional.interpolate(torch.arange(float(old))[None, None], int(new))[0, 0].tolist()
        if scale not in (None, new / old) or rows != [position * old // new for position in range(new)]:
            raise UnknownReceptiveField(f"it resizes {old} positions to {new} by rounding")
    return _on_map(operation, see, read=lambda axis, before, after: nearest(before, after))


def _resize_linear(operation: Operation, see: See) -> Sight:
    corners = bool(operation.given("align_corners"))
    before, after = _seen(operation, see).shape[-2:], operation.outputs[0].shape[-2:]
    for scale, old, new in zip(_scales(operation), before, after, strict=True):
        if not corners and scale not in (None, new / old):
            raise UnknownReceptiveField(f"it resizes {old} positions to {new} by a factor of {scale}")
        if corners and min(old, new) < 2:
            raise UnknownReceptiveField(f"it lays the corners of {old} positions on those of {new}")
    return _on_map(operation, see, read=lambda axis, before, after: linear(before, after, corners=corners))


def _scales(operation: Operation) -> list[object]:
    """By how much a resizing says that it resizes rows and columns, None where only by the sizes."""
    return [operation.given("scales_h"), operation.given("scales_w")]


def _shuffle(operation: Operation, see: See) -> Sight:
    if _seen(operation, see).mixture:
        raise UnknownReceptiveField("it lays channels of branches that were put side by side on the map")
    return _on_map(operation, see, read=lambda axis, before, after: nearest(before, after))


def _unshuffle(operation: Operation, see: See) -> Sight:
    factor = operation.number("downscale_factor")
    behind = _on_map(operation, see, read=lambda axis, before, after: window(factor, stride=factor))
    return replace(behind, mixture=True)


def _on_map(operation: Operation, see: See, *, read: Callable[[int, int, int], Reading]) -> Sight:
    """The last two dimensions read so, the one before them of as many channels as come out."""
    sight, after = _seen(operation, see), operation.outputs[0].shape
    for axis, dim in enumerate((len(after) - 2, len(after) - 1)):
        sight = sight.along(dim, read(axis, sight.shape[dim], after[dim]), count=after[dim])
    if len(after) > 2 and sight.shape[-3] != after[-3]:
        sight = sight.rearranged([*sight.dims[:-3], [Part(after[-3])], *sight.dims[-2:]])
    return sight


def _pad(operation: Operation, see: See) -> Sight:
    sight = _seen(operation, see)
    starts = (operation.numbers("pad") or operation.numbers("padding"))[::2]  # the last dimension first
    for back, start in enumerate(starts, start=1):
        dim = len(sight.dims) - back
        sight = sight.along(dim, steps(-start), count=operation.outputs[0].shape[dim])
    return sight


def _unfold(operation: Operation, see: See) -> Sight:
    sight, size = _seen(operation, see), operation.number("size")
    dim = operation.number("dimension") % len(sight.dims)
    windows = sight.along(dim, window(size, stride=operation.number("step")), count=operation.outputs[0].shape[dim])
    return replace(windows.rearranged([*windows.dims, [Part(size)]]), mixture=windows.mixture or size > 1)


def _view(operation: Operation, see: See) -> Sight:
    return _seen(operation, see).regrouped(operation.outputs[0].shape)


def _permute(operation: Operation, see: See) -> Sight:
    sight = _seen(operation, see)
    return sight.rearranged(sight.dims[dim] for dim in operation.numbers("dims"))


def _transpose(operation: Operation, see: See) -> Sight:
    sight = _seen(operation, see)
    one, other = (0, 1) if operation.name == "t" else (operation.number("dim0"), operation.number("dim1"))
    dims = list(sight.dims)
    dims[one], dims[other] = dims[other], dims[one]
    return sight.rearranged(dims)


def _unsqueeze(operation: Operation, see: See) -> Sight:
    sight = _seen(operation, see)
    dims = list(sight.dims)
    dims.insert(operation.number("dim") % (len(dims) + 1), ())
    return sight.rearranged(dims)


def _squeeze(operation: Operation, see: See) -> Sight:
    sight = _seen(operation, see)
    every = operation.numbers("dim") or range(len(sight.dims))
    gone = {dim % len(sight.dims) for dim in every if sight.shape[dim] == 1}
    return sight.rearranged(dim for position, dim in enumerate(sight.dims) if position not in gone)


def _slice(operation: Operation, see: See) -> Sight:
    sight = _seen(operation, see)
    dim = operation.number("dim") % len(sight.dims)
    size, count, step = sight.shape[dim], operation.outputs[0].shape[dim], operation.number("step")
    return sight if count == size else sight.along(dim, steps(start_of(operation, size), step=step), count=count)


def start_of(operation: Operation, size: int) -> int:
    """Where a slice of a dimension of this size begins, from 0 to the size."""
    start = next(iter(operation.numbers("start")), 0)
    return min(start if start >= 0 else max(0, size + start), size)


def _select(operation: Operation, see: See) -> Sight:
    sight = _seen(operation, see)
    dim = operation.number("dim") % len(sight.dims)
    index = operation.number("index") % sight.shape[dim]
    one = sight.along(dim, steps(index), count=1)
    return one.rearranged(kept for position, kept in enumerate(one.dims) if position != dim)


def _split(operation: Operation, see: See) -> list[Sight]:
    sight = _seen(operation, see)
    dim, start = operation.number("dim") % len(sight.dims), 0
    pieces = []
    for output in operation.outputs:
        count = output.shape[dim]
        pieces.append(sight.along(dim, steps(start), count=count))
        start += count
    return pieces


def _unbind(operation: Operation, see: See) -> list[Sight]:
    sight = _seen(operation, see)
    dim = operation.number("dim") % len(sight.dims)
    single = [sight.along(dim, steps(index), count=1) for index in range(len(operation.outputs))]
    return [one.rearranged(kept for at, kept in enumerate(one.dims) if at != dim) for one in single]


def _join(operation: Operation, see: See) -> Sight:
    """Concatenation, or with a dimension of its own stacking."""
    shape = operation.outputs[0].shape
    dim = operation.number("dim") % len(shape)
    sights = []
    for sight in _all_seen(operation.inputs, see):
        dims = list(sight.dims)
        if operation.name == "stack":
            dims.insert(dim, ())
        if sight.rearranged(dims).axis_of(dim) is not None:
            raise UnknownReceptiveField("it puts maps side by side")
        dims[dim] = (Part(shape[dim]),)
        sights.append(sight.rearranged(dims))
    behind = broadcast(sights, shape, side_by_side=True)
    if dim == 0 and behind.mixture:
        raise UnknownReceptiveField("it puts images beside others that see more or less")
    constants = len(operation.inputs) > len(sights)
    return replace(behind, mixture=behind.mixture or constants)


def _reduction(operation: Operation, see: See) -> Sight:
    sight = _seen(operation, see)
    return sight.mixed(operation.numbers("dim") or range(len(sight.dims)), keep=bool(operation.given("keepdim")))


def _softmax(operation: Operation, see: See) -> Sight:
    return _seen(operation, see).seeing_all(operation.numbers("dim"))


def _batch_norm(operation: Operation, see: See) -> Sight:
    sight = _scaled(operation, see)
    own = operation.given("training") or operation.given("running_mean") is None
    return sight.normalized([dim for dim in range(len(sight.dims)) if dim != 1]) if own else sight


def _layer_norm(operation: Operation, see: See) -> Sight:
    sight = _scaled(operation, see)
    return sight.normalized(range(-len(operation.numbers("normalized_shape")), 0))


def _group_norm(operation: Operation, see: See) -> Sight:
    sight = _scaled(operation, see)
    return sight.normalized(range(1, len(sight.dims)))


def _scaled(operation: Operation, see: See) -> Sight:
    """What a norm is applied to, with scales and shifts that are made of the image."""
    sight = _seen(operation, see)
    return meet([sight, *_all_seen(operation.inputs[1:], see)], sight.dims)


def _product(operation: Operation, see: See) -> Sight:
    """Matrix products: entry (i, j) reads row i of the one and column j of the other."""
    *biases, one, other = operation.inputs
    shape = operation.outputs[0].shape
    left, right = (sight and sight.seeing_all([dim]) for sight, dim in ((see(one), -1), (see(other), -2)))
    if left and right and _on_a_map(left.dims[-2]) and _on_a_map(right.dims[-1]):  # each with each other: attention
        left, right = left.seeing_all([-2]), right.seeing_all([-1]).rearranged([*right.dims[:-1], [Part(shape[-1])]])
    rows = left.dims[-2] if left else (Part(shape[-2]),)
    columns = right.dims[-1] if right else (Part(shape[-1]),)
    factors = [sight for sight in (left, right) if sight]
    batches = {sight.dims[:-2] for sight in factors if any(map(_on_a_map, sight.dims[:-2]))}
    if len(batches) > 1 or (batches and len(factors) > 1 and factors[0].dims[:-2] != factors[1].dims[:-2]):
        raise UnknownReceptiveField("it multiplies maps whose positions are not the same")
    added = [broadcast([sight], shape) for sight in _all_seen(biases, see)]
    behind = meet([*factors, *added], (*factors[0].dims[:-2], rows, columns))
    # Channels are summed, and those that remain are new ones, unless there are several more beside them, as heads are.
    others = [part for dim in (*behind.dims[:-2], rows if left else columns) for part in dim if part.axis is None]
    summed = len(factors) == 1 and sum(part.size > 1 for part in others) <= 1
    return replace(behind, mixture=False) if summed else behind


def _on_a_map(parts: Sequence[Part]) -> bool:
    return any(part.axis is not None and part.size > 1 for part in parts)


def _along_others(operation: Operation, see: See) -> Sight:
    """Turning and rolling, of channels or images but not of the map."""
    sight, dims = _seen(operation, see), operation.numbers("dims")
    if not dims or any(sight.axis_of(dim) is not None for dim in dims):
        raise UnknownReceptiveField("it moves the map")
    return sight


RULES: dict[str, Rule] = {
    **dict.fromkeys(["convolution", "convolution_overrideable"], _convolution),
    **dict.fromkeys(["max_pool2d_with_indices", "avg_pool2d"], _pool),
    **dict.fromkeys(["adaptive_avg_pool2d", "adaptive_max_pool2d"], _adaptive_pool),
    "upsample_nearest2d": _resize,
    "upsample_bilinear2d": _resize_linear,
    "pixel_shuffle": _shuffle,
    "pixel_unshuffle": _unshuffle,
    **dict.fromkeys(["constant_pad_nd", "reflection_pad2d", "replication_pad2d"], _pad),
    "unfold": _unfold,
    **dict.fromkeys(["view", "unsafe_view", "reshape"], _view),
    "permute": _permute,
    **dict.fromkeys(["transpose", "t"], _transpose),
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "slice": _slice,
    "select": _select,
    **dict.fromkeys(["split", "split_with_sizes"], _split),
    "unbind": _unbind,
    **dict.fromkeys(["cat", "stack"], _join),
    **dict.fromkeys(["mean", "sum", "max", "min", "amax", "amin", "var", "std", "linalg_vector_norm"], _reduction),
    **dict.fromkeys(["softmax", "safe_softmax", "log_softmax"], _softmax),
    **dict.fromkeys(["native_batch_norm", "native_batch_norm_legit_no_training"], _batch_norm),
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    **dict.fromkeys(["mm", "bmm", "addmm", "baddbmm"], _product),
    **dict.fromkeys(["roll", "flip"], _along_others),
}
