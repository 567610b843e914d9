"""The receptive field of every operation of a network, exact or refused, by the rules of `op_rules`."""

from collections.abc import Sequence
from typing import NamedTuple, Self

from torch import Tensor

from models.analysis.axes import TensorAxes, image_axes
from models.analysis.intervals import AxisField, TapPattern, UnknownReceptiveField
from models.analysis.op_rules import outputs_of, slice_start
from models.analysis.trace import Operation, Trace, storage_of

OVERWRITTEN = "it reads a tensor that was overwritten through another view"


class ReceptiveField(NamedTuple):
    """The receptive field of one unit along one axis, in pixels; no numbers without a path made of kernels."""

    size: int | None = None  # the largest, where units differ after upsampling and uneven pooling
    stride: float | None = None  # mean distance between the fields of neighbouring units
    offset: int | None = None  # first pixel of the first unit, negative in the padding
    is_global: bool = False  # another path reads the entire axis

    @classmethod
    def along(cls, field: AxisField) -> Self:
        """The receptive field along an axis of a tensor."""
        if not field.has_local_path:
            return cls(is_global=field.is_global)
        return cls(field.size, float(field.stride), field.offset, field.is_global)


def receptive_fields(trace: Trace) -> list[TensorAxes | None]:
    """The fields of `known_fields`. Raises: UnknownReceptiveField for the first operation whose field is unknown."""
    fields, unknown = known_fields(trace)
    if unknown is not None:
        raise UnknownReceptiveField(unknown)
    return fields


def known_fields(trace: Trace) -> tuple[list[TensorAxes | None], str | None]:
    """The field of the first output of each operation, and the first unknown one with the reason.

    None stands for operations that do not depend on the images, and for unknown ones. Other branches continue.
    """
    tensors, unknown = _TensorFields(trace.images), None
    fields: list[TensorAxes | None] = []
    for operation in trace.operations:
        try:
            outputs = outputs_of(operation, tensors.lookup)
        except UnknownReceptiveField as error:
            unknown = unknown or f"receptive field unknown: {operation.location}: {error}"
            tensors.forget(operation)
            outputs = []
        else:
            tensors.record(operation, outputs)
        fields.append(outputs[0] if outputs else None)
    if unknown is None and id(trace.outputs) in tensors.unknown:
        unknown = f"receptive field unknown: output of the network: {OVERWRITTEN}"
    return fields, unknown


class _TensorFields:
    """The fields of all tensors of a trace, as far as it has been followed."""

    def __init__(self, images: Tensor) -> None:
        self._fields: dict[int, TensorAxes | None] = {id(images): image_axes(images.shape)}
        self._sharing: dict[int, set[int]] = {}  # tensors by the storage that they share
        self.unknown: set[int] = set()  # tensors overwritten through another view, or from unknown operations
        self._unknown_storages: set[int] = set()  # written to by operations without a known field
        self._slices: dict[int, tuple[Tensor, dict[int, int]]] = {}  # slices of constants: base, starts by dimension

    def lookup(self, tensor: Tensor) -> TensorAxes | None:
        """The field of a tensor. Raises: UnknownReceptiveField if it is unknown."""
        if id(tensor) in self.unknown:
            raise UnknownReceptiveField(OVERWRITTEN)
        return self._fields.get(id(tensor))

    def forget(self, operation: Operation) -> None:
        """Mark as unknown the outputs of an operation, and everything that shares memory with one it wrote to."""
        for output in operation.outputs or operation.tensors:
            self.unknown.add(id(output))
            if operation.in_place:
                self.unknown |= self._sharing.get(storage_of(output), set())
                self._unknown_storages.add(storage_of(output))

    def record(self, operation: Operation, fields: Sequence[TensorAxes | None]) -> None:
        """Store the fields of the outputs of an operation."""
        for tensor in operation.tensors:
            self._sharing.setdefault(storage_of(tensor), set()).add(id(tensor))
        for output, field in zip(operation.outputs, fields, strict=True):
            sharing = self._sharing.setdefault(storage_of(output), set())
            if operation.in_place and field != self._fields.get(id(output)):
                self.unknown |= sharing - {id(output)}
            sharing.add(id(output))
            self._fields[id(output)] = field
            if field is None and any(fields):  # statistics of a norm, which nothing may read
                self.unknown.add(id(output))
        if operation.name == "slice" and fields == [None] and operation.integer("step") == 1:
            self._record_slice(operation)
        elif operation.name == "copy" and fields[0] is not None and id(operation.tensor(0)) in self._slices:
            self._fill_slice(operation, fields[0])

    def _record_slice(self, operation: Operation) -> None:
        source, output = operation.tensor(0), operation.outputs[0]
        base, starts = self._slices.get(id(source), (source, {}))
        dim = operation.integer("dim") % source.ndim
        start = starts.get(dim, 0) + slice_start(operation, source.shape[dim])
        self._slices[id(output)] = (base, {**starts, dim: start})

    def _fill_slice(self, operation: Operation, field: TensorAxes) -> None:
        """Treat a map that is copied into a slice of a constant as padded by the rest of the constant."""
        base, starts = self._slices[id(operation.tensor(0))]
        for dim, start in starts.items():
            field = field.along(dim, TapPattern.slice(-start), size=base.shape[dim])
        if self._fields.get(id(base)) is None and storage_of(base) not in self._unknown_storages:
            self._fields[id(base)] = field
            self.unknown.discard(id(base))
