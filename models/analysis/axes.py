"""The layout of a tensor: which dimensions hold rows and columns, with the receptive field along both axes.

To follow changes of layout, as (N, C, H, W) to (N, L, C), each dimension is a product of factors that know their axis.
"""

import functools
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

from models.analysis.intervals import AxisField, TapPattern, UnknownReceptiveField

ROWS, COLUMNS = 0, 1
AXES = (ROWS, COLUMNS)
AXIS_NAMES = ("rows", "columns")


class Factor(NamedTuple):
    """A factor of a dimension: a number of rows or columns, or, without an axis, of channels, images or heads."""

    size: int
    axis: int | None = None

    @property
    def is_map(self) -> bool:
        """Whether it holds several positions of an axis."""
        return self.axis is not None and self.size > 1


Dims = tuple[tuple[Factor, ...], ...]


@dataclass(frozen=True)
class TensorAxes:
    """The dimensions of a tensor, and the receptive field along both axes of the map that they hold."""

    dims: Dims
    fields: tuple[AxisField, AxisField]
    is_mixed: bool = False  # some channels read fewer pixels than others; `fields` covers all of them

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(map(_size, self.dims))

    @property
    def has_local_field(self) -> bool:
        """Whether some path made of kernels leads here from the image along both axes."""
        return all(field.has_local_path for field in self.fields)

    def axis_of(self, dim: int) -> int | None:
        """The axis of a dimension that holds nothing else, None without one."""
        on_axes = [factor for factor in self.dims[dim] if factor.axis is not None]
        if not on_axes:
            return None
        if len(on_axes) > 1 or _size(self.dims[dim]) != on_axes[0].size:
            raise UnknownReceptiveField(f"it treats {_describe(self.dims[dim])} as one axis")
        return on_axes[0].axis

    def rearranged(self, dims: Iterable[Sequence[Factor]]) -> Self:
        """The same fields with other dimensions."""
        return replace(self, dims=tuple(tuple(dim) for dim in dims))

    def along(self, dim: int, pattern: TapPattern, *, size: int) -> Self:
        """The axes after an operation that reads a dimension by this pattern and leaves `size` entries of it."""
        axis, dims, fields = self.axis_of(dim), list(self.dims), list(self.fields)
        if axis is None and size < self.shape[dim] and self.is_mixed:
            raise UnknownReceptiveField("it selects channels of concatenated branches")
        is_mixed = self.is_mixed or (axis is None and size > self.shape[dim])  # new channels read nothing
        dims[dim] = (Factor(size, axis),)
        if axis is not None:
            fields[axis] = fields[axis].through(pattern, size)
        return replace(self, dims=tuple(dims), fields=(fields[ROWS], fields[COLUMNS]), is_mixed=is_mixed)

    def viewed(self, shape: Sequence[int]) -> Self:
        """The axes after a view of this shape, which must not split rows or columns."""
        factors = deque(factor for dim in self.dims for factor in dim if factor.size > 1 or factor.axis is not None)
        dims = [_take(factors, size) for size in shape]
        if any(factor.size > 1 for factor in factors):
            raise UnknownReceptiveField(f"{self.shape} cannot be viewed as {tuple(shape)}")
        return self.rearranged([*dims[:-1], [*dims[-1], *factors]] if dims else [])

    def made_global(self, dims: Iterable[int]) -> Self:
        """The axes after an operation that makes each position depend on all others along some dimensions."""
        fields = list(self.fields)
        for size, axis in (factor for dim in dims for factor in self.dims[dim]):
            if axis is not None and size > 1:
                fields[axis] = fields[axis].made_global(AXIS_NAMES[axis])
        return replace(self, fields=(fields[ROWS], fields[COLUMNS]))

    def normalized(self, dims: Iterable[int]) -> Self:
        """The axes after a norm with statistics over some dimensions: fields become global, local ones stay too."""
        fields = zip(self.fields, self.made_global(dims).fields, strict=True)
        rows, columns = (replace(field, is_global=statistic.is_global) for field, statistic in fields)
        return replace(self, fields=(rows, columns))

    def map_axes(self) -> set[int | None]:
        """The axes with more than one position."""
        return {factor.axis for dim in self.dims for factor in dim if factor.is_map}


def image_axes(shape: Sequence[int]) -> TensorAxes:
    """The axes of a batch of images. Shapes: (N, C, H, W)."""
    num_images, channels, height, width = shape
    dims = ((Factor(num_images),), (Factor(channels),), (Factor(height, ROWS),), (Factor(width, COLUMNS),))
    return TensorAxes(dims, (AxisField(height, height), AxisField(width, width)))


def meet(tensors: Sequence[TensorAxes], dims: Dims, *, concatenated: bool = False) -> TensorAxes:
    """Combine tensors, elementwise or by concatenation, into one with these dimensions.

    A tensor with one position on an axis where others have many is broadcast, so it must read the entire axis.
    """
    map_axes = [factor.axis for dim in dims for factor in dim if factor.is_map]
    if len(map_axes) > len(set(map_axes)):
        combined = (_describe(dim) for dim in dims if dim and dim[0].axis in map_axes)
        raise UnknownReceptiveField("it combines " + " with ".join(combined))
    rows, columns = (_joined_axis(tensors, axis, on_map=axis in map_axes) for axis in AXES)
    differ = concatenated and any(tensor.fields != tensors[0].fields for tensor in tensors)
    return TensorAxes(dims, (rows, columns), differ or any(tensor.is_mixed for tensor in tensors))


def broadcast(tensors: Sequence[TensorAxes], shape: Sequence[int], *, concatenated: bool = False) -> TensorAxes:
    """Broadcast tensors to one shape and combine them by `meet`."""
    dims: list[tuple[Factor, ...]] = []
    for back, size in enumerate(shape, start=-len(shape)):
        groups = [tensor.dims[back] for tensor in tensors if len(tensor.dims) >= -back]
        on_axes = {tuple(factor for factor in group if factor.axis is not None) for group in groups} - {()}
        on_axes = {factors for factors in on_axes if any(factor.is_map for factor in factors)} or on_axes
        if len(on_axes) > 1:
            raise UnknownReceptiveField("it combines " + " with ".join(sorted(map(_describe, on_axes))))
        matching = [group for group in groups if _size(group) == size] or [(Factor(size),)]
        dims.append(max(matching, key=lambda group: sum(part.axis is not None for part in group)))
    return meet(tensors, tuple(dims), concatenated=concatenated)


def _joined_axis(tensors: Sequence[TensorAxes], axis: int, *, on_map: bool) -> AxisField:
    """One axis of several tensors that meet on many positions, or on one."""
    fields = [
        field.made_global(AXIS_NAMES[axis]) if on_map and axis not in tensor.map_axes() else field
        for tensor, field in ((tensor, tensor.fields[axis]) for tensor in tensors)
    ]
    joined = functools.reduce(AxisField.joined, [field for field in fields if field.has_local_path] or fields)
    return replace(joined, is_global=any(field.is_global for field in fields))


def _take(factors: deque[Factor], size: int) -> list[Factor]:
    """Take the factors of a dimension of this size from the front."""
    taken: list[Factor] = []
    while size > 1 or (factors and factors[0].size == 1 and not taken):
        if not factors:
            raise UnknownReceptiveField("the sizes of a view do not match")
        factor = factors.popleft()
        if size % factor.size == 0:
            taken.append(factor)
            size //= factor.size
        elif factor.size % size == 0 and factor.axis is None:
            taken.append(Factor(size))
            factors.appendleft(Factor(factor.size // size))
            size = 1
        else:
            raise UnknownReceptiveField(f"it splits {_describe([factor])} into windows or patches")
    return taken


def _size(factors: Iterable[Factor]) -> int:
    return math.prod(factor.size for factor in factors)


def _describe(factors: Iterable[Factor]) -> str:
    return " x ".join(str(size) if axis is None else f"{size} {AXIS_NAMES[axis]}" for size, axis in factors)
