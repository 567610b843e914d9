"""A network layer by layer: shapes, parameters, multiply-adds, receptive fields."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn

from models.analysis.axes import AXES, COLUMNS, ROWS, TensorAxes
from models.analysis.cost import multiply_adds, separable_cost_ratio
from models.analysis.receptive_field import ReceptiveField, known_fields
from models.analysis.trace import NETWORK_ITSELF, Operation, Trace, storage_of, trace
from models.layers import ConvNet

BATCH = 2  # images traced together: one could not be distinguished from other dimensions of size 1
# Operations that only rearrange or create tensors: no layers when they stand alone.
LAYOUT = {
    "view", "unsafe_view", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "alias", "detach", "clone",
    "slice", "select", "split", "split_with_sizes", "unbind", "unfold", "empty", "zeros", "as_strided", "to_copy",
    "copy",
}  # fmt: skip


class Pixels(NamedTuple):
    """A number of pixels along rows and along columns."""

    rows: float
    columns: float


@dataclass(frozen=True)
class LayerSummary:
    """One layer of a network, for one image.

    `kind` describes it for people: `Conv2d 3x3, stride 2`. `shape` is that of the output, (C, H, W) for a map in any
    memory layout. `misalignment` is the largest distance in pixels between the field centers of branches that met.
    `separable_cost` is the cost of this depthwise layer and the next pointwise one relative to a standard convolution,
    None for other layers.
    """

    name: str
    kind: str
    stage: str
    shape: tuple[int, ...]
    num_parameters: int
    macs: int
    rows: ReceptiveField
    columns: ReceptiveField
    misalignment: float = 0.0
    separable_cost: float | None = None

    @property
    def location(self) -> str:
        """Its name, or its kind for an operation of the network itself."""
        return self.name or f"{self.kind} of {NETWORK_ITSELF}"

    @property
    def has_local_field(self) -> bool:
        """Whether a path of convolutions and poolings leads here along both axes."""
        return self.rows.size is not None and self.columns.size is not None

    @property
    def local_size(self) -> Pixels | None:
        """Sides of the local receptive field; None without one along both axes."""
        rows, columns = self.rows.size, self.columns.size
        return None if rows is None or columns is None else Pixels(rows, columns)

    @property
    def local_stride(self) -> Pixels | None:
        """Distances between neighbouring units' local fields; None without a local field along both axes."""
        rows, columns = self.rows.stride, self.columns.stride
        return None if rows is None or columns is None else Pixels(rows, columns)

    @property
    def is_global(self) -> bool:
        """Whether each unit depends on the entire image through a mean, a gate or attention."""
        return self.rows.is_global and self.columns.is_global

    @property
    def num_activations(self) -> int:
        """Number of elements of the output."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class NetworkSummary:
    """All layers in the order of execution, for an image of shape (C, H, W).

    `num_parameters` includes layers that an evaluation does not use. `unknown` names the first operation without a
    known receptive field, and the reason; None if all are known.
    """

    image_shape: tuple[int, int, int]
    layers: list[LayerSummary]
    num_parameters: int
    num_trainable: int
    unknown: str | None

    @property
    def num_unused(self) -> int:
        """Number of parameters that an evaluation does not use."""
        return self.num_parameters - sum(layer.num_parameters for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-adds of one image."""
        return sum(layer.macs for layer in self.layers)

    @property
    def num_activations(self) -> int:
        """Number of elements of all outputs."""
        return sum(layer.num_activations for layer in self.layers)

    @property
    def last_local_layer(self) -> LayerSummary | None:
        """The last layer with a local receptive field, which is that of the network.

        None without such a layer, and if any receptive field is unknown.
        """
        if self.unknown is not None:
            return None
        return next((layer for layer in reversed(self.layers) if layer.has_local_field), None)

    @property
    def first_global_layer(self) -> LayerSummary | None:
        """The first layer that depends on the entire image through a mean, a gate or attention."""
        return next((layer for layer in self.layers if layer.is_global), None)

    @property
    def stages(self) -> dict[str, list[LayerSummary]]:
        """The layers by stage."""
        stages: dict[str, list[LayerSummary]] = {}
        for layer in self.layers:
            stages.setdefault(layer.stage, []).append(layer)
        return stages


def summarize(net: nn.Module, image_shape: tuple[int, int, int]) -> NetworkSummary:
    """Trace a network on the shape (C, H, W) of one image and summarize its layers.

    Raises: TraceError for a network that needs values or does not accept this shape; ValueError for an invalid shape.
    """
    sides = [*image_shape] if isinstance(image_shape, Sequence) else []
    if len(sides) != 3 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"{image_shape} is not the shape of an image: give (C, H, W), three positive integers")
    traced = trace(net, (BATCH, *image_shape))
    fields, unknown = known_fields(traced)
    layers = list(_layers(net, traced, fields=fields))
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in net.parameters()]
    return NetworkSummary(
        image_shape=image_shape,
        layers=layers if isinstance(net, ConvNet) else _staged_by_size(layers),
        num_parameters=sum(count for count, _ in counts),
        num_trainable=sum(count for count, trainable in counts if trainable),
        unknown=unknown,
    )


def _layers(net: nn.Module, traced: Trace, *, fields: Sequence[TensorAxes | None]) -> Iterator[LayerSummary]:
    """One layer per call of a module without children, and one per operation outside such modules.

    Parameters count where they are first used, or in the next layer if that use only prepares them.
    """
    leaves = {name for name, module in net.named_modules() if not any(module.children())}
    uncounted = {id(tensor): tensor.numel() for tensor in traced.parameters.values()}
    dependent, num_parameters = traced.image_dependent(), 0
    for call in _calls(traced, leaves):
        num_parameters += sum(uncounted.pop(id(tensor), 0) for one in call.values() for tensor in one.inputs)
        active = {position: one for position, one in call.items() if position in dependent and one.outputs}
        last = max(active, default=None)
        if last is None or (active[last].layer not in leaves and active[last].name in LAYOUT):
            continue
        layer = _layer(net, traced, active=active, axes=fields[last])
        yield replace(layer, num_parameters=num_parameters)
        num_parameters = 0


def _calls(traced: Trace, leaves: set[str]) -> Iterator[dict[int, Operation]]:
    """Operations by position: together for one call of a leaf module, alone elsewhere."""

    def key(item: tuple[int, Operation]) -> tuple[int, int | None]:
        position, operation = item
        return operation.call, None if operation.layer in leaves else position

    return (dict(group) for _, group in itertools.groupby(enumerate(traced.operations), key=key))


def _layer(net: nn.Module, traced: Trace, *, active: Mapping[int, Operation], axes: TensorAxes | None) -> LayerSummary:
    """A layer from its operations on the image, without its parameters."""
    last = active[max(active)]
    busiest = max(active, key=lambda position: (multiply_adds(active[position]), active[position] is last))
    module = net.get_submodule(last.layer)
    kind = last.name if any(module.children()) else type(module).__name__
    details = _details(active[busiest], net.get_submodule(active[busiest].layer))
    rows, columns = (ReceptiveField.along(axis) for axis in axes.fields) if axes else (ReceptiveField(),) * 2
    return LayerSummary(
        name=last.layer,
        kind=f"{kind} {details}" if details else kind,
        stage=_stage(net, last.layer),
        shape=_shape(last.outputs[0], axes),
        num_parameters=0,
        macs=sum(map(multiply_adds, active.values())) // BATCH,
        rows=rows,
        columns=columns,
        misalignment=float(max(axis.misalignment for axis in axes.fields)) if axes else 0.0,
        separable_cost=_separable_cost(traced, busiest),
    )


def _stage(net: nn.Module, name: str) -> str:
    """The stage of a module: named by a ConvNet, in other networks the outermost module."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] or first if isinstance(net, ConvNet) and first == "stages" else first


def _staged_by_size(layers: Sequence[LayerSummary]) -> list[LayerSummary]:
    """Layers of a network without named stages: its outermost modules, split where their maps change size."""
    maps = [(layer.stage, layer.shape[1:]) for layer in layers if layer.has_local_field and len(layer.shape) == 3]
    sizes = {stage: [size for other, size in maps if other == stage] for stage, _ in maps}
    current = {stage: stage_sizes[0] for stage, stage_sizes in sizes.items()}
    staged = []
    for layer in layers:
        stage = layer.stage
        if layer.has_local_field and len(layer.shape) == 3:
            current[stage] = layer.shape[1:]
        several = len(set(sizes.get(stage, []))) > 1
        suffix = f" at {'x'.join(map(str, current[stage]))}" if several else ""
        staged.append(replace(layer, stage=(stage or NETWORK_ITSELF) + suffix))
    return staged


def _shape(output: Tensor, axes: TensorAxes | None) -> tuple[int, ...]:
    """The shape for one image, (C, H, W) for maps. The batch comes first, alone or multiplied with other dimensions."""
    if axes is not None and len(axes.dims) == 4 and axes.shape[0] == BATCH and all(len(dim) <= 1 for dim in axes.dims):
        order = [axes.axis_of(dim) for dim in range(4)]
        if set(AXES) <= set(order):
            channels = next(dim for dim in (1, 2, 3) if order[dim] is None)
            return tuple(axes.shape[dim] for dim in (channels, order.index(ROWS), order.index(COLUMNS)))
    if not output.ndim:
        return ()
    first, *rest = output.shape
    if first == BATCH:
        return tuple(rest)
    return (first // BATCH, *rest) if first % BATCH == 0 else (first, *rest)


def _details(operation: Operation, module: nn.Module) -> str:
    """Kernel, stride, dilation and groups in words, of the operation or of a module without a convolution of its own.

    Empty for layers without a kernel.
    """
    if operation.name == "convolution":
        kernel, groups = list(operation.tensor(1).shape[2:]), operation.integer("groups")
        stride, dilation = operation.pair("stride"), operation.pair("dilation")
    elif "pool2d" in operation.name and operation.argument("kernel_size"):
        kernel, groups = operation.pair("kernel_size"), 1
        stride, dilation = operation.pair("stride", kernel), operation.pair("dilation")
    elif isinstance(module, nn.Conv2d):
        kernel, groups = list(module.kernel_size), module.groups
        stride, dilation = list(module.stride), list(module.dilation)
    else:
        return ""
    depthwise = _is_depthwise(operation) or (isinstance(module, nn.Conv2d) and groups == module.in_channels)
    words = ["x".join(map(str, kernel))]
    words += [f"stride {_one_or_both(stride)}"] if set(stride) != {1} else []
    words += [f"dilation {_one_or_both(dilation)}"] if set(dilation) != {1} else []
    words += ["transposed"] if operation.argument("transposed") else []
    words += ["depthwise" if depthwise else f"{groups} groups"] if groups > 1 else []
    return ", ".join(words)


def _one_or_both(pair: list[int]) -> str:
    return str(pair[0]) if len(set(pair)) == 1 else "x".join(map(str, pair))


def _is_depthwise(operation: Operation) -> bool:
    """Whether each filter reads one channel, with one filter or more per channel."""
    return operation.name == "convolution" and operation.integer("groups") == operation.tensor(0).shape[1] > 1


def _separable_cost(traced: Trace, position: int) -> float | None:
    """Cost of a depthwise convolution and the pointwise layer on its map, relative to a standard convolution."""
    depthwise = traced.operations[position]
    if not _is_depthwise(depthwise) or depthwise.argument("transposed"):
        return None
    maps, kernel = depthwise.outputs[0], depthwise.tensor(1)
    if kernel.shape[0] != depthwise.tensor(0).shape[1]:
        return None
    kernel_size = kernel.shape[2:]
    num_positions, storages = maps.numel() // maps.shape[1], {storage_of(maps)}
    for operation in traced.operations[position + 1 :]:
        if not any(storage_of(tensor) in storages for tensor in operation.inputs):
            continue
        storages.update(map(storage_of, operation.outputs))
        output = operation.outputs[0] if operation.outputs else maps
        if operation.name == "convolution" and operation.tensor(0).shape[2:] == maps.shape[2:]:
            weight = operation.tensor(1)
            pointwise = weight.shape[1:] == (maps.shape[1], 1, 1)
            return float(separable_cost_ratio(kernel_size, weight.shape[0])) if pointwise else None
        if operation.name in ("addmm", "mm") and math.prod(output.shape[:-1]) == num_positions:
            return float(separable_cost_ratio(kernel_size, output.shape[-1]))
    return None
