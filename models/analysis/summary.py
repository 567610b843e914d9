"""A network layer by layer and stage by stage: shapes, parameters, multiply-adds, memory, receptive fields."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn

from models.analysis.axes import AXES, COLUMNS, ROWS, Axis, Sight
from models.analysis.cost import cost_of_separating, multiply_adds
from models.analysis.receptive_field import known_fields
from models.analysis.trace import ITSELF, Operation, Trace, memory_of, trace
from models.layers import ConvNet

BATCH = 2  # images that are run together, so that their dimension is told from others
# What only lays numbers out anew, or brings numbers in, is no layer of its own.
LAYOUT = {
    "view", "unsafe_view", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "alias", "detach", "clone",
    "slice", "select", "split", "split_with_sizes", "unbind", "unfold", "empty", "zeros", "as_strided", "to_copy",
    "copy",
}  # fmt: skip


class Pixels(NamedTuple):
    """A number along rows and along columns."""

    rows: float
    columns: float


class Window(NamedTuple):
    """What one unit sees through convolutions and poolings alone, in pixels of the image."""

    size: Pixels
    jump: Pixels
    offset: Pixels


class Seen(NamedTuple):
    """What one unit sees along rows or along columns, in pixels of the image.

    `size`, `jump` and `offset`, the first pixel that the first unit sees, are those of paths made of windows, None
    where there are none; negative pixels lie in the padding. `whole` says that another path sees all of the image.
    Behind upsampling and uneven pooling units see unlike windows: `size` is the widest, `jump` the average.
    """

    size: int | None = None
    jump: float | None = None
    offset: int | None = None
    whole: bool = False


@dataclass(frozen=True)
class Layer:
    """One layer of a network for one image; `kind` is what it is, `stage` the part of the network it lies in.

    `shape` is that of its output, (C, H, W) where that is a map, however it lies in memory.

    `spread` says how many pixels the middles of branches lie apart. `separable` is what this depthwise layer and the
    pointwise one behind it cost of a standard convolution, None for any other.
    """

    name: str
    kind: str
    stage: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    rows: Seen
    columns: Seen
    spread: float
    separable: float | None = None

    @property
    def place(self) -> str:
        """Where it is: its name, or what it is of the network itself."""
        return self.name or f"{self.kind} of {ITSELF}"

    @property
    def window(self) -> Window | None:
        """What it sees through windows along both axes; None where, along one of them, no such path leads."""
        rows, columns = self.rows, self.columns
        if rows.size is None or rows.jump is None or rows.offset is None:
            return None
        if columns.size is None or columns.jump is None or columns.offset is None:
            return None
        sides = Pixels(rows.size, columns.size), Pixels(rows.jump, columns.jump), Pixels(rows.offset, columns.offset)
        return Window(*sides)

    @property
    def whole(self) -> bool:
        """Whether it sees all of the image at once."""
        return self.rows.whole and self.columns.whole

    @property
    def activations(self) -> int:
        """Numbers in the output."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Inspection:
    """All layers in the order of their work, for an image of shape (C, H, W).

    `parameters` counts all, in layers that an evaluation does not use too. `unknown` names the operation behind which
    there are no receptive fields, and why; None where all are known.
    """

    image: tuple[int, int, int]
    layers: list[Layer]
    parameters: int
    trainable: int
    unknown: str | None

    @property
    def unused(self) -> int:
        """Parameters that an evaluation does not use."""
        return self.parameters - sum(layer.parameters for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return sum(layer.macs for layer in self.layers)

    @property
    def activations(self) -> int:
        """Numbers in the outputs of all layers."""
        return sum(layer.activations for layer in self.layers)

    @property
    def last_window(self) -> Layer | None:
        """The last layer that is reached through windows: where the receptive field is that of the network.

        None where there is none, or where behind an operation fields are unknown.
        """
        if self.unknown is not None:
            return None
        return next((layer for layer in reversed(self.layers) if layer.window is not None), None)

    @property
    def first_whole(self) -> Layer | None:
        """The first layer that sees the whole image otherwise than through windows."""
        return next((layer for layer in self.layers if layer.whole), None)

    @property
    def stages(self) -> dict[str, list[Layer]]:
        """The layers by stage."""
        stages: dict[str, list[Layer]] = {}
        for layer in self.layers:
            stages.setdefault(layer.stage, []).append(layer)
        return stages


def inspect(net: nn.Module, image: tuple[int, int, int]) -> Inspection:
    """Run a network on shapes alone and read off all that is known of it; `image` is (C, H, W).

    Raises: Untraceable for a network that does not run so, or not on such images; ValueError for what is no image.
    """
    sides = [*image] if isinstance(image, Sequence) else []
    if len(sides) != 3 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"{image} is no image: give (C, H, W), three whole numbers above 0")
    traced = trace(net, (BATCH, *image))
    sights, unknown = known_fields(traced)
    work = list(_work(net, traced, sights=sights))
    layers = [replace(one.layer, separable=_separable(traced, one.operation)) for one in work]
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in net.parameters()]
    return Inspection(
        image=image,
        layers=layers if isinstance(net, ConvNet) else _parted(layers),
        parameters=sum(count for count, _ in counts),
        trainable=sum(count for count, trained in counts if trained),
        unknown=unknown,
    )


class _Work(NamedTuple):
    """A layer, and the operation in it that multiplies, or else its last."""

    layer: Layer
    operation: Operation


def _work(net: nn.Module, traced: Trace, *, sights: Sequence[Sight | None]) -> Iterator[_Work]:
    """What each call of a module without children does to the images, and of the others each operation by itself.

    Parameters are counted where they are first used, or in the next layer where that only prepares them.
    """
    leaves = {name for name, layer in net.named_modules() if not any(layer.children())}
    unused = {id(tensor): tensor.numel() for tensor in traced.parameters.values()}
    fed, parameters = traced.fed_by_images(), 0
    numbered = enumerate(traced.operations)
    calls = itertools.groupby(numbered, key=lambda one: (one[1].call, None if one[1].layer in leaves else one[0]))
    for _, call in calls:
        operations = dict(call)
        parameters += sum(unused.pop(id(tensor), 0) for one in operations.values() for tensor in one.inputs)
        working = {place: operation for place, operation in operations.items() if place in fed and operation.outputs}
        last = max(working, default=None)
        if last is None or (working[last].layer not in leaves and working[last].name in LAYOUT):
            continue
        busiest = max(working.values(), key=lambda one: (multiply_adds(one), one is working[last]))
        macs = sum(map(multiply_adds, working.values())) // BATCH
        details = _details(busiest, net.get_submodule(busiest.layer))
        layer = _layer(net, working[last], sight=sights[last], details=details)
        yield _Work(replace(layer, parameters=parameters, macs=macs), busiest)
        parameters = 0


def _layer(net: nn.Module, last: Operation, *, sight: Sight | None, details: str) -> Layer:
    """A layer from its last operation, without its counts."""
    module = net.get_submodule(last.layer)
    kind = last.name if any(module.children()) else type(module).__name__
    return Layer(
        name=last.layer,
        kind=f"{kind} {details}" if details else kind,
        stage=_stage(net, last.layer),
        shape=_shape(last.outputs[0], sight),
        parameters=0,
        macs=0,
        rows=_seen(sight.axes[ROWS]) if sight is not None else Seen(),
        columns=_seen(sight.axes[COLUMNS]) if sight is not None else Seen(),
        spread=float(max(axis.spread for axis in sight.axes)) if sight is not None else 0.0,
    )


def _stage(net: nn.Module, name: str) -> str:
    """The part of the network that a module lies in: as a ConvNet names it, in others the outermost module."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] or first if isinstance(net, ConvNet) and first == "stages" else first


def _parted(layers: Sequence[Layer]) -> list[Layer]:
    """The layers of a network without named stages: its outermost modules, parted where their maps change in size."""
    maps = [(layer.stage, layer.shape[1:]) for layer in layers if layer.window is not None and len(layer.shape) == 3]
    sizes = {stage: [size for other, size in maps if other == stage] for stage, _ in maps}
    reached = {stage: found[0] for stage, found in sizes.items()}
    parted = []
    for layer in layers:
        stage = layer.stage
        if layer.window is not None and len(layer.shape) == 3:
            reached[stage] = layer.shape[1:]
        several = len(set(sizes.get(stage, []))) > 1
        where = f" at {'x'.join(map(str, reached[stage]))}" if several else ""
        parted.append(replace(layer, stage=(stage or ITSELF) + where))
    return parted


def _shape(output: Tensor, sight: Sight | None) -> tuple[int, ...]:
    """That for one image, rows and columns last; images come first, alone or with what was taken together with them."""
    if sight is not None and len(sight.dims) == 4 and sight.shape[0] == BATCH:
        axes = [sight.axis_of(dim) for dim in range(4)] if all(len(dim) <= 1 for dim in sight.dims) else []
        if set(AXES) <= set(axes):
            channels = next(dim for dim in (1, 2, 3) if axes[dim] is None)
            return tuple(sight.shape[dim] for dim in (channels, axes.index(ROWS), axes.index(COLUMNS)))
    if not output.ndim:
        return ()
    first, *rest = output.shape
    return tuple(rest) if first == BATCH else (first // BATCH, *rest) if first % BATCH == 0 else (first, *rest)


def _seen(axis: Axis) -> Seen:
    field = axis.field
    return Seen(whole=axis.whole) if field is None else Seen(field.size, float(field.jump), field.offset, axis.whole)


def _details(operation: Operation, module: nn.Module) -> str:
    """What a kind leaves open: kernel, stride, dilation, groups, of the operation or of a layer without one."""
    if operation.name == "convolution":
        kernel, groups = list(operation.tensor(1).shape[2:]), operation.number("groups")
        stride, dilation = operation.pair("stride"), operation.pair("dilation")
    elif "pool2d" in operation.name and operation.given("kernel_size"):
        kernel, groups = operation.pair("kernel_size"), 1
        stride, dilation = operation.pair("stride", kernel), operation.pair("dilation")
    elif isinstance(module, nn.Conv2d):
        kernel, groups = list(module.kernel_size), module.groups
        stride, dilation = list(module.stride), list(module.dilation)
    else:
        return ""
    depthwise = _is_depthwise(operation) or (isinstance(module, nn.Conv2d) and groups == module.in_channels)
    said = ["x".join(map(str, kernel))]
    said += [f"stride {_single(stride)}"] if set(stride) != {1} else []
    said += [f"dilation {_single(dilation)}"] if set(dilation) != {1} else []
    said += ["transposed"] if operation.given("transposed") else []
    said += ["depthwise" if depthwise else f"{groups} groups"] if groups > 1 else []
    return ", ".join(said)


def _single(pair: list[int]) -> str:
    return str(pair[0]) if len(set(pair)) == 1 else "x".join(map(str, pair))


def _is_depthwise(operation: Operation) -> bool:
    """One filter a channel, or several that each see one."""
    return operation.name == "convolution" and operation.number("groups") == operation.tensor(0).shape[1] > 1


def _separable(traced: Trace, depthwise: Operation) -> float | None:
    """What a depthwise layer and the pointwise one that comes next on its map cost of a standard convolution."""
    if not _is_depthwise(depthwise):
        return None
    maps, kernel = depthwise.outputs[0], depthwise.tensor(1)
    if depthwise.given("transposed") or kernel.shape[0] != depthwise.tensor(0).shape[1]:
        return None
    size = (kernel.shape[2], kernel.shape[3])
    positions, made = maps.numel() // maps.shape[1], {memory_of(maps)}
    for operation in traced.operations[traced.operations.index(depthwise) + 1 :]:
        if not any(memory_of(tensor) in made for tensor in operation.inputs):
            continue
        made.update(map(memory_of, operation.outputs))
        output = operation.outputs[0] if operation.outputs else maps
        if operation.name == "convolution" and operation.tensor(0).shape[2:] == maps.shape[2:]:
            weight = operation.tensor(1)
            pointwise = weight.shape[1:] == (maps.shape[1], 1, 1)
            return float(cost_of_separating(size, weight.shape[0])) if pointwise else None
        if operation.name in ("addmm", "mm") and math.prod(output.shape[:-1]) == positions:
            return float(cost_of_separating(size, output.shape[-1]))
    return None
