"""What a tensor sees of the image: which of its dimensions are rows and columns of a map, and what each position reads.

Layouts change all the time, (N, C, H, W) to (N, H, W, C), to (N, L, C), to (N H W, C), and a field can only be followed
as long as it is known which dimension is which. So each dimension is a product of parts, and each part knows its axis.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

from models.analysis.intervals import Field, Interval, Reading, distance, hull, union

ROWS, COLUMNS = 0, 1
AXES = (ROWS, COLUMNS)
NAMES = ("rows", "columns")


class UnknownReceptiveField(ValueError):
    """Why the receptive field behind an operation is not known."""


class Part(NamedTuple):
    """A factor of a dimension: so many rows or columns, or, without an axis, channels, images, heads."""

    size: int
    axis: int | None = None


Dims = tuple[tuple[Part, ...], ...]


@dataclass(frozen=True)
class Axis:
    """What the positions along the rows or columns of a map read.

    `field` is that of the paths made of windows, None where there is none; `whole` says that some path reads all of the
    image, through a mean, a gate or attention. `spread` is the largest distance in pixels between the middles of fields
    of branches that met, 0 where all were aligned. `image` is the image's own size, `count` the map's.
    """

    field: Field | None
    image: int
    count: int
    whole: bool = False
    spread: Fraction = Fraction(0)
    cut: tuple[int, int] = (0, 0)  # pixels at both ends that slices and strides have left out

    def through(self, reading: Reading, count: int) -> Axis:
        """Behind an operation that reads this axis so, and leaves `count` positions."""
        return replace(
            self, field=self.field and self.field.through(reading), count=count, cut=self._cut(reading, count)
        )

    def reads_all(self) -> bool:
        """Whether all positions together read the image, but for less than a jump that strides leave over."""
        spare = self.field.jump if self.field else 1
        return max(self.cut) < spare

    def _cut(self, reading: Reading, count: int) -> tuple[int, int]:
        """What is left out behind an operation: padding brings nothing back."""
        read = _read_of(self.count, reading, outputs=count)
        if self.field is None or read == (0, self.count - 1):
            return self.cut
        pixels = hull(self.field.at(place) for place in read) if read is not None else None
        first, last = pixels or (self.image, -1)
        return (max(self.cut[0], first), max(self.cut[1], self.image - 1 - last))


@dataclass(frozen=True)
class Sight:
    """What a tensor sees: its dimensions, and each axis of the map that they hold."""

    dims: Dims
    axes: tuple[Axis, Axis]
    mixture: bool = False  # some channels see less than others; the axes are those of all together

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's."""
        return tuple(math.prod(part.size for part in dim) for dim in self.dims)

    @property
    def local(self) -> bool:
        """Whether windows alone lead from the image to here, on one path at least."""
        return all(axis.field is not None for axis in self.axes)

    @property
    def whole(self) -> bool:
        """Whether each position sees all of the image."""
        return all(axis.whole for axis in self.axes)

    def axis_of(self, dim: int) -> int | None:
        """The axis that a dimension is, None where it holds none. Raises: UnknownReceptiveField where it holds more."""
        found = [part for part in self.dims[dim] if part.axis is not None]
        if not found:
            return None
        if len(found) > 1 or math.prod(part.size for part in self.dims[dim]) != found[0].size:
            raise UnknownReceptiveField(f"it takes {_words(self.dims[dim])} for one axis")
        return found[0].axis

    def rearranged(self, dims: Iterable[Sequence[Part]]) -> Sight:
        """The same with other dimensions."""
        return replace(self, dims=tuple(tuple(dim) for dim in dims))

    def along(self, dim: int, reading: Reading, *, count: int) -> Sight:
        """Behind an operation that reads a dimension so, and leaves `count` positions, channels or images of it."""
        axis, dims, axes = self.axis_of(dim), list(self.dims), list(self.axes)
        if axis is None and count < self.shape[dim] and self.mixture:
            raise UnknownReceptiveField("it takes some channels of branches that were put side by side")
        mixture = self.mixture or (axis is None and count > self.shape[dim])  # padded with channels that see nothing
        dims[dim] = (Part(count, axis),)
        if axis is not None:
            axes[axis] = axes[axis].through(reading, count)
        return Sight(tuple(dims), (axes[ROWS], axes[COLUMNS]), mixture)

    def regrouped(self, shape: Sequence[int]) -> Sight:
        """Behind a view of this shape. Raises: UnknownReceptiveField where it cuts rows or columns into pieces."""
        parts = deque(part for dim in self.dims for part in dim if part.size > 1 or part.axis is not None)
        dims = [_take(parts, size) for size in shape]
        if any(part.size > 1 for part in parts):
            raise UnknownReceptiveField(f"no view of {self.shape} has the shape {tuple(shape)}")
        return self.rearranged([*dims[:-1], [*dims[-1], *parts]] if dims else [])

    def mixed(self, dims: Iterable[int], *, keep: bool) -> Sight:
        """Behind an operation that makes one of all entries along some dimensions, kept with size 1 or left out.

        Raises: UnknownReceptiveField where those are many positions, but not all of the map.
        """
        gone = {dim % len(self.dims) for dim in dims}
        sight = self.seeing_all(gone)
        single = {position: [part for part in self.dims[position] if part == (1, part.axis)] for position in gone}
        kept = [single.get(position, dim) for position, dim in enumerate(self.dims) if keep or position not in gone]
        return sight.rearranged(kept)

    def seeing_all(self, dims: Iterable[int]) -> Sight:
        """Where each position sees all others along some dimensions, and is a window's no more.

        Along rows or columns of which there is one the window remains.
        Raises: UnknownReceptiveField where those are many positions, but not all of the map.
        """
        axes = list(self.axes)
        for part in (part for dim in dims for part in self.dims[dim]):
            if part.axis is not None and part.size > 1:
                axes[part.axis] = _all_of(axes[part.axis], NAMES[part.axis])
        return replace(self, axes=(axes[ROWS], axes[COLUMNS]))

    def normalized(self, dims: Iterable[int]) -> Sight:
        """Behind a norm whose statistics are taken along some dimensions: each position sees all, by way of them.

        The windows remain. Raises: UnknownReceptiveField where those are many positions, but not all of the map.
        """
        all_seen = self.seeing_all(dims)
        rows, columns = (
            replace(before, whole=after.whole) for before, after in zip(self.axes, all_seen.axes, strict=True)
        )
        return replace(self, axes=(rows, columns))

    def held(self) -> set[int]:
        """The axes of which it has more than one position."""
        return {part.axis for dim in self.dims for part in dim if part.axis is not None and part.size > 1}


def _read_of(count: int, reading: Reading, *, outputs: int) -> Interval | None:
    """The first and last of `count` positions that so many outputs read, None for none; what is beside is padding."""
    first, last = count, -1
    for output in range(outputs):
        first = min([first, *(tap for tap in reading.taps(output) if 0 <= tap < count)])
        if first == 0:
            break
    for output in reversed(range(outputs)):
        last = max([last, *(tap for tap in reading.taps(output) if 0 <= tap < count)])
        if last == count - 1:
            break
    return (first, last) if first <= last else None


def images_of(shape: Sequence[int]) -> Sight:
    """What a batch of images sees of itself. Shapes: (N, C, H, W)."""
    num_images, channels, height, width = shape
    dims = ((Part(num_images),), (Part(channels),), (Part(height, ROWS),), (Part(width, COLUMNS),))
    return Sight(dims, (Axis(Field(), height, height), Axis(Field(), width, width)))


def meet(sights: Sequence[Sight], dims: Dims, *, side_by_side: bool = False) -> Sight:
    """What several tensors see that become one with these dimensions, each entry of all of them or of one.

    Along each axis the windows are joined; of what sees all of it remains that it does. What has one position where
    others have many is the same for all of them, so it must see the whole axis.
    Raises: UnknownReceptiveField where branches do not fit together.
    """
    held = [part.axis for dim in dims for part in dim if part.axis is not None and part.size > 1]
    if len(held) > len(set(held)):
        raise UnknownReceptiveField(
            "it lays " + " beside ".join(_words(dim) for dim in dims if dim and dim[0].axis in held)
        )
    rows, columns = (_meeting(sights, axis, held=axis in held) for axis in AXES)
    differ = side_by_side and any(sight.axes != sights[0].axes for sight in sights)
    return Sight(dims, (rows, columns), differ or any(sight.mixture for sight in sights))


def broadcast(sights: Sequence[Sight], shape: Sequence[int], *, side_by_side: bool = False) -> Sight:
    """What several tensors see that become one of this shape, entry by entry, or, side by side, one after the other.

    Raises: UnknownReceptiveField where rows of one lie beside something else of another.
    """
    dims: list[tuple[Part, ...]] = []
    for position, size in enumerate(shape):
        groups = [sight.dims[position - len(shape)] for sight in sights if position >= len(shape) - len(sight.dims)]
        on_map = {tuple(part for part in group if part.axis is not None) for group in groups}
        on_map = {parts for parts in on_map if any(part.size > 1 for part in parts)} or {p for p in on_map if p}
        if len(on_map) > 1:
            raise UnknownReceptiveField("it lays " + " beside ".join(sorted(map(_words, on_map))))
        fitting = [group for group in groups if math.prod(part.size for part in group) == size]
        dims.append(max(fitting, key=lambda group: sum(part.axis is not None for part in group), default=(Part(size),)))
    return meet(sights, tuple(dims), side_by_side=side_by_side)


def _meeting(sights: Sequence[Sight], axis: int, *, held: bool) -> Axis:
    """One axis of several tensors that meet where it has many positions, or one."""
    told = [
        _all_of(sight.axes[axis], NAMES[axis]) if held and axis not in sight.held() else sight.axes[axis]
        for sight in sights
    ]
    joined = functools.reduce(_joined, [one for one in told if one.field is not None] or told)
    return replace(joined, whole=any(one.whole for one in told))


def _all_of(axis: Axis, name: str) -> Axis:
    if axis.field is not None and not axis.reads_all():
        raise UnknownReceptiveField(f"it takes {axis.count} {name}, which do not see all of the image, for the whole")
    return replace(axis, field=None, whole=True)


def _joined(one: Axis, other: Axis) -> Axis:
    spread = max(one.spread, other.spread)
    if one.field is None or other.field is None:
        return replace(one, field=one.field or other.field, count=max(one.count, other.count), spread=spread)
    cut = (min(one.cut[0], other.cut[0]), min(one.cut[1], other.cut[1]))
    try:
        field = union(one.field, other.field)
    except ValueError as error:
        raise UnknownReceptiveField(str(error)) from error
    return replace(one, field=field, spread=max(spread, distance(one.field, other.field)), cut=cut)


def _take(parts: deque[Part], size: int) -> list[Part]:
    """Take from the front what makes a dimension of this size."""
    taken: list[Part] = []
    missing = size
    while missing > 1 or (parts and parts[0].size == 1 and not taken):
        if not parts:
            raise UnknownReceptiveField("the sizes of a view do not fit")
        part = parts.popleft()
        if missing % part.size == 0:
            taken.append(part)
            missing //= part.size
        elif part.size % missing == 0 and part.axis is None:
            taken.append(Part(missing))
            parts.appendleft(Part(part.size // missing))
            missing = 1
        else:
            raise UnknownReceptiveField(f"it cuts {_words([part])} into pieces, windows or patches")
    return taken


def _words(parts: Iterable[Part]) -> str:
    words = [f"{part.size} {NAMES[part.axis]}" if part.axis is not None else str(part.size) for part in parts]
    return " x ".join(words)
