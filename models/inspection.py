"""A network layer by layer and stage by stage: shapes, parameters, multiply-adds, memory, receptive fields."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn

from models.complexity import multiply_adds, separable_ratio
from models.fields import Field
from models.layers import ConvNet
from models.receptive_field import receptive_fields
from models.sights import AXES, COLUMNS, ROWS, Sight, UnknownReceptiveField
from models.tracing import Operation, Trace, memory_of, trace

BATCH = 2  # images that are run together, so that their dimension is told from others
# What only lays numbers out anew, or brings numbers in, is no layer of its own.
LAYOUT = {
    *("view", "unsafe_view", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "alias", "detach", "clone"),
    *(
        "slice",
        "select",
        "split",
        "split_with_sizes",
        "unbind",
        "unfold",
        "empty",
        "zeros",
        "as_strided",
        "to_copy",
        "copy",
    ),
}


class Pixels(NamedTuple):
    """A number along rows and along columns."""

    rows: float
    columns: float


class Window(NamedTuple):
    """What one unit sees through convolutions and poolings alone, in pixels of the image.

    `offset` is the first pixel that the first unit sees; negative ones lie in the padding.
    """

    size: Pixels
    jump: Pixels
    offset: Pixels


@dataclass(frozen=True)
class Layer:
    """One layer of a network for one image; `kind` is what it is, `stage` the part of the network it lies in.

    `shape` is that of its output, (C, H, W) where that is a map, however it lies in memory.

    `window` is None where no path of windows leads; `whole` says that each unit sees the whole image, and `spread` how
    many pixels the middles of branches lie apart. `separable` is what this depthwise layer and the pointwise one behind
    it cost of a standard convolution, None for any other.
    """

    name: str
    kind: str
    stage: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    window: Window | None
    whole: bool
    spread: float
    separable: float | None = None

    @property
    def activations(self) -> int:
        """Numbers in the output."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Inspection:
    """All layers in the order of their work, for an image of shape (C, H, W).

    `parameters` counts all, in layers that an evaluation does not use too. `unknown` says why there are no receptive
    fields, None where there are.
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
        """The last layer that is reached through windows: where the receptive field is that of the network."""
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

    Raises: Untraceable for a network that does not run so, or not on such images.
    """
    traced = trace(net, (BATCH, *image))
    try:
        sights, unknown = receptive_fields(traced), None
    except UnknownReceptiveField as error:
        sights, unknown = [None] * len(traced.operations), str(error)
    work = list(_work(net, traced, sights=sights))
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in net.parameters()]
    return Inspection(
        image=image,
        layers=[replace(one.layer, separable=_separable(traced, one.operation)) for one in work],
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
    calls = itertools.groupby(
        enumerate(traced.operations), key=lambda pair: (pair[1].call, pair[1].layer in leaves or pair[0])
    )
    for _, call in calls:
        operations = dict(call)
        parameters += sum(unused.pop(id(tensor), 0) for one in operations.values() for tensor in one.inputs)
        working = {place: operation for place, operation in operations.items() if place in fed}
        last = max(working, default=None)
        if last is None or (working[last].layer not in leaves and working[last].name in LAYOUT):
            continue
        busiest = max(working.values(), key=lambda one: (multiply_adds(one), one is working[last]))
        macs = sum(map(multiply_adds, working.values())) // BATCH
        layer = _layer(net, working[last], sight=sights[last], details=_details(busiest))
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
        window=_window(sight) if sight is not None and sight.local else None,
        whole=sight is not None and sight.whole,
        spread=float(max(axis.spread for axis in sight.axes)) if sight is not None else 0.0,
    )


def _stage(net: nn.Module, name: str) -> str:
    """The part of the network that a module lies in: as a ConvNet names it, in others the outermost module."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] or first if isinstance(net, ConvNet) and first == "stages" else first


def _shape(output: Tensor, sight: Sight | None) -> tuple[int, ...]:
    """That for one image, rows and columns last; images come first, alone or with what was taken together with them."""
    if sight is not None and len(sight.dims) == 4 and sight.shape[0] == BATCH:
        axes = [sight.axis_of(dim) for dim in range(4)] if all(len(dim) <= 1 for dim in sight.dims) else []
        if set(AXES) <= set(axes):
            channels = next(dim for dim in (1, 2, 3) if axes[dim] is None)
            return tuple(sight.shape[dim] for dim in (channels, axes.index(ROWS), axes.index(COLUMNS)))
    first, *rest = output.shape
    return tuple(rest) if first == BATCH else (first // BATCH, *rest) if first % BATCH == 0 else (first, *rest)


def _window(sight: Sight) -> Window:
    rows, columns = (axis.field or Field() for axis in sight.axes)
    return Window(
        Pixels(rows.size, columns.size),
        Pixels(float(rows.jump), float(columns.jump)),
        Pixels(rows.offset, columns.offset),
    )


def _details(operation: Operation) -> str:
    """What a kind leaves open: kernel, stride, dilation, groups."""
    if operation.name == "convolution":
        kernel, groups = list(operation.tensor(1).shape[2:]), operation.number("groups")
    elif "pool2d" in operation.name and operation.given("kernel_size"):
        kernel, groups = operation.pair("kernel_size"), 1
    else:
        return ""
    stride, dilation = operation.pair("stride", kernel), operation.pair("dilation")
    said = ["x".join(map(str, kernel))]
    said += [f"stride {_single(stride)}"] if set(stride) != {1} else []
    said += [f"dilation {_single(dilation)}"] if set(dilation) != {1} else []
    said += ["transposed"] if operation.given("transposed") else []
    said += ["depthwise" if _is_depthwise(operation) else f"{groups} groups"] if groups > 1 else []
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
            return float(separable_ratio(size, weight.shape[0])) if pointwise else None
        if operation.name in ("addmm", "mm") and math.prod(output.shape[:-1]) == positions:
            return float(separable_ratio(size, output.shape[-1]))
    return None
