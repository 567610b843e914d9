"""A network layer by layer: shapes, parameters, multiply-adds, receptive fields."""

import itertools
import math
from collections import Counter
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
LAYOUT = {  # operations that only rearrange or create tensors: no layers when they stand alone
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
    """One layer of a network, for one image."""

    name: str
    kind: str  # for people: `Conv2d 3x3, stride 2`
    stage: str
    shape: tuple[int, ...]  # of the output, (C, H, W) for a map in any memory layout
    num_parameters: int
    macs: int
    rows: ReceptiveField
    columns: ReceptiveField
    misalignment: float = 0.0  # largest distance in pixels between the field centers of branches that met
    separable_cost: float | None = None  # with the next pointwise layer, relative to a standard convolution

    @property
    def location(self) -> str:
        """Its name, or its kind for an operation of the network itself."""
        return self.name or f"{self.kind} of {NETWORK_ITSELF}"

    @property
    def local_size(self) -> Pixels | None:
        """Sides of the local receptive field; None without one along both axes."""
        rows, columns = self.rows.size, self.columns.size
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
    """All layers in the order of execution, for an image of shape (C, H, W)."""

    image_shape: tuple[int, int, int]
    layers: list[LayerSummary]
    num_parameters: int  # with layers that an evaluation does not use
    num_trainable: int
    unknown: str | None  # the first operation without a known receptive field, and the reason

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
        """The last layer with a local receptive field, which is that of the network; None if any field is unknown."""
        known = self.layers if self.unknown is None else []
        return next((layer for layer in reversed(known) if layer.local_size), None)

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
    """Trace a network on the shape (C, H, W) of one image and summarize its layers. Raises: TraceError, ValueError."""
    sides = [*image_shape] if isinstance(image_shape, Sequence) else []
    if len(sides) != 3 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"{image_shape} is not the shape of an image: give (C, H, W), three positive integers")
    traced = trace(net, (BATCH, *image_shape))
    fields, unknown = known_fields(traced)
    layers = list(_layers(net, traced, fields=fields))
    staged = layers if isinstance(net, ConvNet) else _staged_by_size(layers)
    num_parameters = sum(one.numel() for one in net.parameters())
    num_trainable = sum(one.numel() for one in net.parameters() if one.requires_grad)
    return NetworkSummary(image_shape, staged, num_parameters, num_trainable, unknown)


def _layers(net: nn.Module, traced: Trace, *, fields: Sequence[TensorAxes | None]) -> Iterator[LayerSummary]:
    """One layer per call of a module without children, and one per operation outside such modules."""
    leaves = {name for name, module in net.named_modules() if not any(module.children())}
    uncounted = {id(tensor): tensor.numel() for tensor in traced.parameters.values()}
    # Parameters count where they are first used, or in the next layer if that use only prepares them.
    dependent, num_parameters = traced.image_dependent(), 0
    for call in _calls(traced, leaves):
        num_parameters += sum(uncounted.pop(id(tensor), 0) for one in call.values() for tensor in one.inputs)
        active = {position: one for position, one in call.items() if position in dependent and one.outputs}
        last = max(active, default=None)
        if last is not None and (active[last].layer in leaves or active[last].name not in LAYOUT):
            yield _layer(net, traced, active=active, axes=fields[last], num_parameters=num_parameters)
            num_parameters = 0


def _calls(traced: Trace, leaves: set[str]) -> Iterator[dict[int, Operation]]:
    """Operations by position: together for one call of a leaf module, alone elsewhere."""
    keys = [(one.call, None if one.layer in leaves else position) for position, one in enumerate(traced.operations)]
    groups = itertools.groupby(enumerate(traced.operations), key=lambda item: keys[item[0]])
    return (dict(group) for _, group in groups)


def _layer(
    net: nn.Module, traced: Trace, *, active: Mapping[int, Operation], axes: TensorAxes | None, num_parameters: int
) -> LayerSummary:
    last = active[max(active)]
    stage, _, rest = last.layer.partition(".")  # the outermost module, but named by a ConvNet
    if isinstance(net, ConvNet) and stage == "stages":
        stage = rest.partition(".")[0] or stage
    busiest = max(active, key=lambda position: (multiply_adds(active[position]), active[position] is last))
    module = net.get_submodule(last.layer)
    kind = last.name if any(module.children()) else type(module).__name__
    details = _details(active[busiest], net.get_submodule(active[busiest].layer))
    rows, columns = (ReceptiveField.along(axis) for axis in axes.fields) if axes else (ReceptiveField(),) * 2
    return LayerSummary(
        name=last.layer,
        kind=f"{kind} {details}" if details else kind,
        stage=stage,
        shape=_shape(last.outputs[0], axes),
        num_parameters=num_parameters,
        macs=sum(map(multiply_adds, active.values())) // BATCH,
        rows=rows,
        columns=columns,
        misalignment=float(max(axis.misalignment for axis in axes.fields)) if axes else 0.0,
        separable_cost=_separable_cost(traced, busiest),
    )


def _staged_by_size(layers: Sequence[LayerSummary]) -> list[LayerSummary]:
    """Layers of a network without named stages: its outermost modules, split where their maps change size."""
    maps = [(layer.stage, layer.shape[1:]) for layer in layers if layer.local_size and len(layer.shape) == 3]
    num_sizes = Counter(stage for stage, _ in set(maps))
    current, staged = dict(reversed(maps)), []
    for layer in layers:
        if layer.local_size and len(layer.shape) == 3:
            current[layer.stage] = layer.shape[1:]
        suffix = f" at {'x'.join(map(str, current[layer.stage]))}" if num_sizes[layer.stage] > 1 else ""
        staged.append(replace(layer, stage=(layer.stage or NETWORK_ITSELF) + suffix))
    return staged


def _shape(output: Tensor, axes: TensorAxes | None) -> tuple[int, ...]:
    """The shape for one image, (C, H, W) for maps. The batch comes first, alone or multiplied with other dimensions."""
    if axes is not None and len(axes.dims) == 4 and axes.shape[0] == BATCH and all(len(dim) <= 1 for dim in axes.dims):
        order = [axes.axis_of(dim) for dim in range(4)]
        if set(AXES) <= set(order):
            channels = next(dim for dim in (1, 2, 3) if order[dim] is None)
            return tuple(axes.shape[dim] for dim in (channels, order.index(ROWS), order.index(COLUMNS)))
    if not output.ndim or output.shape[0] % BATCH:
        return tuple(output.shape)
    num_others = output.shape[0] // BATCH
    return (*([] if num_others == 1 else [num_others]), *output.shape[1:])


def _details(operation: Operation, module: nn.Module) -> str:
    """Kernel, stride, dilation and groups in words; empty for layers without a kernel."""
    groups = 1
    if operation.name == "convolution":
        kernel, groups = list(operation.tensor(1).shape[2:]), operation.integer("groups")
        stride, dilation = operation.pair("stride"), operation.pair("dilation")
    elif "pool2d" in operation.name and operation.argument("kernel_size"):
        kernel = operation.pair("kernel_size")
        stride, dilation = operation.pair("stride", kernel), operation.pair("dilation")
    elif isinstance(module, nn.Conv2d):  # whose operation is not torch's convolution
        kernel, groups = list(module.kernel_size), module.groups
        stride, dilation = list(module.stride), list(module.dilation)
    else:
        return ""
    depthwise = _is_depthwise(operation) or (isinstance(module, nn.Conv2d) and groups == module.in_channels)
    words = ["x".join(map(str, kernel))]
    for name, numbers in (("stride", stride), ("dilation", dilation)):
        if set(numbers) != {1}:
            words.append(f"{name} {'x'.join(map(str, numbers if len(set(numbers)) > 1 else numbers[:1]))}")
    words += ["transposed"] if operation.argument("transposed") else []
    words += ["depthwise" if depthwise else f"{groups} groups"] if groups > 1 else []
    return ", ".join(words)


def _is_depthwise(operation: Operation) -> bool:
    """Whether each filter reads one channel, with one filter or more per channel."""
    return operation.name == "convolution" and operation.integer("groups") == operation.tensor(0).shape[1] > 1


def _separable_cost(traced: Trace, position: int) -> float | None:
    """Cost of a depthwise convolution and the pointwise layer on its map, relative to a standard convolution."""
    depthwise = traced.operations[position]
    if not _is_depthwise(depthwise) or depthwise.argument("transposed"):
        return None
    maps, (_, _, *kernel_size) = depthwise.outputs[0], depthwise.tensor(1).shape
    if maps.shape[1] != depthwise.tensor(0).shape[1]:
        return None
    num_positions, storages = maps.numel() // maps.shape[1], {storage_of(maps)}
    for operation in traced.operations[position + 1 :]:
        if not any(storage_of(tensor) in storages for tensor in operation.inputs):
            continue
        storages.update(map(storage_of, operation.outputs))
        output = operation.outputs[0] if operation.outputs else maps
        if operation.name == "convolution" and operation.tensor(0).shape[2:] == maps.shape[2:]:
            weight = operation.tensor(1)
            is_pointwise = weight.shape[1:] == (maps.shape[1], 1, 1)
            return float(separable_cost_ratio(kernel_size, weight.shape[0])) if is_pointwise else None
        if operation.name in ("addmm", "mm") and math.prod(output.shape[:-1]) == num_positions:
            return float(separable_cost_ratio(kernel_size, output.shape[-1]))
    return None
