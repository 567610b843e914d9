"""The receptive field of a tensor: which dimensions hold rows and columns, and which pixels each position reads.

To follow changes of layout, (N, C, H, W) to (N, H, W, C), to (N, L, C), to (N H W, C), each dimension is a product of
factors, and each factor knows its axis.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

from models.analysis.intervals import Interval, Intervals, TapPattern, distance, hull, union

ROWS, COLUMNS = 0, 1
AXES = (ROWS, COLUMNS)
AXIS_NAMES = ("rows", "columns")


class UnknownReceptiveField(ValueError):
    """The receptive field of an operation is unknown, for the reason in the message."""


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
class AxisField:
    """Which pixels the positions along the rows or columns of a map read.

    `local` holds the intervals of the paths made of kernels, None without such a path. `is_global` says that some path
    reads the entire axis, through a mean, a gate or attention. `misalignment` is the largest distance in pixels between
    the centers of branches that met. `image_side` is the size of the image, `size` that of the map.
    """

    local: Intervals | None
    image_side: int
    size: int
    is_global: bool = False
    misalignment: Fraction = Fraction(0)
    unread: tuple[int, int] = (0, 0)  # pixels at both ends that slices and strides have left out

    def through(self, pattern: TapPattern, size: int) -> AxisField:
        """The field after an operation with this pattern and `size` outputs."""
        local = self.local and self.local.through(pattern)
        return replace(self, local=local, size=size, unread=self._unread_after(pattern, size))

    def made_global(self, name: str) -> AxisField:
        """The field after a reduction over all positions, which must read the image up to less than a stride."""
        if self.local is not None and max(self.unread) >= self.local.stride:
            raise UnknownReceptiveField(f"it uses {self.size} {name}, which do not cover the image, as the entire axis")
        return replace(self, local=None, is_global=True)

    def _unread_after(self, pattern: TapPattern, size: int) -> tuple[int, int]:
        """Pixels left out after an operation; padding brings none back."""
        positions = _positions_read(self.size, pattern, outputs=size)
        if self.local is None or positions == (0, self.size - 1):
            return self.unread
        pixels = hull(map(self.local.at, positions)) if positions is not None else None
        first, last = pixels or (self.image_side, -1)
        return (max(self.unread[0], first), max(self.unread[1], self.image_side - 1 - last))


@dataclass(frozen=True)
class TensorAxes:
    """The dimensions of a tensor, and the receptive field along both axes of the map that they hold.

    Methods return those after an operation. They raise UnknownReceptiveField for parts of axes and other operations
    that the fields cannot follow.
    """

    dims: Dims
    fields: tuple[AxisField, AxisField]
    is_mixed: bool = False  # some channels read fewer pixels than others; `fields` covers all of them

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(_size(dim) for dim in self.dims)

    @property
    def has_local_field(self) -> bool:
        """Whether some path made of kernels leads here from the image along both axes."""
        return all(field.local is not None for field in self.fields)

    @property
    def is_global(self) -> bool:
        """Whether each position depends on the entire image."""
        return all(field.is_global for field in self.fields)

    def axis_of(self, dim: int) -> int | None:
        """The axis of a dimension that holds nothing else, None without one."""
        on_axes = [factor for factor in self.dims[dim] if factor.axis is not None]
        if not on_axes:
            return None
        if len(on_axes) > 1 or _size(self.dims[dim]) != on_axes[0].size:
            raise UnknownReceptiveField(f"it treats {_describe(self.dims[dim])} as one axis")
        return on_axes[0].axis

    def rearranged(self, dims: Iterable[Sequence[Factor]]) -> TensorAxes:
        """The same fields with other dimensions."""
        return replace(self, dims=tuple(tuple(dim) for dim in dims))

    def along(self, dim: int, pattern: TapPattern, *, size: int) -> TensorAxes:
        """After an operation that reads a dimension by this pattern and leaves `size` entries of it."""
        axis, dims, fields = self.axis_of(dim), list(self.dims), list(self.fields)
        if axis is None and size < self.shape[dim] and self.is_mixed:
            raise UnknownReceptiveField("it selects channels of concatenated branches")
        padded_channels = axis is None and size > self.shape[dim]  # new channels read nothing
        dims[dim] = (Factor(size, axis),)
        if axis is not None:
            fields[axis] = fields[axis].through(pattern, size)
        return TensorAxes(tuple(dims), (fields[ROWS], fields[COLUMNS]), self.is_mixed or padded_channels)

    def viewed(self, shape: Sequence[int]) -> TensorAxes:
        """After a view of this shape, which must not split rows or columns."""
        factors = deque(factor for dim in self.dims for factor in dim if factor.size > 1 or factor.axis is not None)
        dims = [_take(factors, size) for size in shape]
        if any(factor.size > 1 for factor in factors):
            raise UnknownReceptiveField(f"{self.shape} cannot be viewed as {tuple(shape)}")
        return self.rearranged([*dims[:-1], [*dims[-1], *factors]] if dims else [])

    def reduced(self, dims: Iterable[int], *, keep: bool) -> TensorAxes:
        """After a reduction over some dimensions, kept with size 1 or removed."""
        gone = {dim % len(self.dims) for dim in dims}
        ones = {dim: [factor for factor in self.dims[dim] if factor.size == 1] for dim in gone}
        kept = [ones.get(position, dim) for position, dim in enumerate(self.dims) if keep or position not in gone]
        return self.made_global(gone).rearranged(kept)

    def made_global(self, dims: Iterable[int]) -> TensorAxes:
        """After an operation in which each position depends on all along some dimensions; single ones stay local."""
        fields = list(self.fields)
        for factor in (factor for dim in dims for factor in self.dims[dim]):
            if factor.axis is not None and factor.size > 1:
                fields[factor.axis] = fields[factor.axis].made_global(AXIS_NAMES[factor.axis])
        return replace(self, fields=(fields[ROWS], fields[COLUMNS]))

    def normalized(self, dims: Iterable[int]) -> TensorAxes:
        """After a norm with statistics over some dimensions, which makes fields global and keeps local ones."""
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
    return TensorAxes(dims, (AxisField(Intervals(), height, height), AxisField(Intervals(), width, width)))


def meet(tensors: Sequence[TensorAxes], dims: Dims, *, concatenated: bool = False) -> TensorAxes:
    """Several tensors combined into one with these dimensions, entry by entry or concatenated.

    Along each axis local fields are joined, and a global one makes the result global. A tensor with one position where
    others have many acts on all of them, so it must read the entire axis.
    Raises: UnknownReceptiveField for branches that do not match.
    """
    map_axes = [factor.axis for dim in dims for factor in dim if factor.is_map]
    if len(map_axes) > len(set(map_axes)):
        combined = (_describe(dim) for dim in dims if dim and dim[0].axis in map_axes)
        raise UnknownReceptiveField("it combines " + " with ".join(combined))
    rows, columns = (_joined_axis(tensors, axis, on_map=axis in map_axes) for axis in AXES)
    differ = concatenated and any(tensor.fields != tensors[0].fields for tensor in tensors)
    return TensorAxes(dims, (rows, columns), differ or any(tensor.is_mixed for tensor in tensors))


def broadcast(tensors: Sequence[TensorAxes], shape: Sequence[int], *, concatenated: bool = False) -> TensorAxes:
    """Several tensors broadcast to one shape, and combined entry by entry or concatenated.

    Raises: UnknownReceptiveField if rows of one meet something else of another.
    """
    dims: list[tuple[Factor, ...]] = []
    for position, size in enumerate(shape):
        back = position - len(shape)
        groups = [tensor.dims[back] for tensor in tensors if len(tensor.dims) >= -back]
        on_axes = {tuple(factor for factor in group if factor.axis is not None) for group in groups} - {()}
        on_axes = {factors for factors in on_axes if any(factor.size > 1 for factor in factors)} or on_axes
        if len(on_axes) > 1:
            raise UnknownReceptiveField("it combines " + " with ".join(sorted(map(_describe, on_axes))))
        matching = [group for group in groups if _size(group) == size]
        dims.append(
            max(matching, key=lambda group: sum(part.axis is not None for part in group), default=(Factor(size),))
        )
    return meet(tensors, tuple(dims), concatenated=concatenated)


def _joined_axis(tensors: Sequence[TensorAxes], axis: int, *, on_map: bool) -> AxisField:
    """One axis of several tensors that meet on many positions, or on one."""
    fields = [tensor.fields[axis] for tensor in tensors]
    if on_map:
        fields = [
            field if axis in tensor.map_axes() else field.made_global(AXIS_NAMES[axis])
            for tensor, field in zip(tensors, fields, strict=True)
        ]
    joined = functools.reduce(_joined, [field for field in fields if field.local is not None] or fields)
    return replace(joined, is_global=any(field.is_global for field in fields))


def _joined(one: AxisField, other: AxisField) -> AxisField:
    misalignment = max(one.misalignment, other.misalignment)
    if one.local is None or other.local is None:
        return replace(one, local=one.local or other.local, size=max(one.size, other.size), misalignment=misalignment)
    unread = (min(one.unread[0], other.unread[0]), min(one.unread[1], other.unread[1]))
    try:
        local = union(one.local, other.local)
    except ValueError as error:
        raise UnknownReceptiveField(str(error)) from error
    misalignment = max(misalignment, distance(one.local, other.local))
    return replace(one, local=local, misalignment=misalignment, unread=unread)


def _positions_read(size: int, pattern: TapPattern, *, outputs: int) -> Interval | None:
    """First and last of `size` positions that the outputs read, None for none; others are padding."""
    first, last = size, -1
    for output in range(outputs):
        first = min([first, *(tap for tap in pattern.taps(output) if 0 <= tap < size)])
        if first == 0:
            break
    for output in reversed(range(outputs)):
        last = max([last, *(tap for tap in pattern.taps(output) if 0 <= tap < size)])
        if last == size - 1:
            break
    return (first, last) if first <= last else None


def _take(factors: deque[Factor], size: int) -> list[Factor]:
    """Take the factors of a dimension of this size from the front."""
    taken: list[Factor] = []
    missing = size
    while missing > 1 or (factors and factors[0].size == 1 and not taken):
        if not factors:
            raise UnknownReceptiveField("the sizes of a view do not match")
        factor = factors.popleft()
        if missing % factor.size == 0:
            taken.append(factor)
            missing //= factor.size
        elif factor.size % missing == 0 and factor.axis is None:
            taken.append(Factor(missing))
            factors.appendleft(Factor(factor.size // missing))
            missing = 1
        else:
            raise UnknownReceptiveField(f"it splits {_describe([factor])} into windows or patches")
    return taken


def _size(factors: Iterable[Factor]) -> int:
    return math.prod(factor.size for factor in factors)


def _describe(factors: Iterable[Factor]) -> str:
    return " x ".join(str(size) if axis is None else f"{size} {AXIS_NAMES[axis]}" for size, axis in factors)
