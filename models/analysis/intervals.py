"""The receptive field along one axis in exact arithmetic: the interval of pixels that each position of a map reads.

For layers in a row this is the recurrence r_l = r_{l-1} + (K_l - 1) j_{l-1}, j_l = j_{l-1} S_l. Intervals are
absolute, so that branches can be joined; after a resize, where neighbouring outputs differ, they have a period.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple, Self

Interval = tuple[int, int]  # first and last pixel; those outside the image lie in the padding


class UnknownReceptiveField(ValueError):
    """The receptive field of an operation is unknown, for the reason in the message."""


class TapPattern(NamedTuple):
    """How an operation reads an axis: output i reads `taps(i)`, output i + outputs the same shifted by `inputs`."""

    taps: Callable[[int], Iterable[int]]
    outputs: int
    inputs: int

    @classmethod
    def kernel(cls, size: int, *, stride: int = 1, padding: int = 0, dilation: int = 1) -> Self:
        """Convolution or pooling: `size` positions, `dilation` apart."""
        first, last = -padding, (size - 1) * dilation - padding
        return cls(lambda output: range(first + output * stride, last + output * stride + 1, dilation), 1, stride)

    @classmethod
    def transposed(cls, size: int, *, stride: int = 1, padding: int = 0, dilation: int = 1) -> Self:
        """Transposed convolution: the positions whose kernel, in the forward convolution, covers the output."""

        def taps(output: int) -> Iterable[int]:
            covered = [output + padding - tap * dilation for tap in range(size)]
            return [position // stride for position in covered if position % stride == 0]

        return cls(taps, stride, 1)

    @classmethod
    def adaptive(cls, before: int, after: int) -> Self:
        """Adaptive pooling from `before` to `after` positions."""
        return cls(lambda output: range(output * before // after, -(-(output + 1) * before // after)), after, before)

    @classmethod
    def nearest(cls, before: int, after: int) -> Self:
        """Nearest-neighbour resizing from `before` to `after` positions."""
        return cls(lambda output: [output * before // after], after, before)

    @classmethod
    def linear(cls, before: int, after: int, *, align_corners: bool) -> Self:
        """Linear resizing from `before` to `after` positions; `align_corners` as in torch."""
        inputs, outputs = (before - 1, after - 1) if align_corners else (before, after)
        center = Fraction(0) if align_corners else Fraction(1, 2)  # of the first position, from the border

        def taps(output: int) -> Iterable[int]:
            position = (output + center) * inputs / outputs - center
            return range(math.floor(position), math.ceil(position) + 1)

        return cls(taps, outputs, inputs)

    @classmethod
    def slice(cls, start: int, *, step: int = 1) -> Self:
        """A slice from `start`; with a negative `start`, padding in front."""
        return cls(lambda output: [start + output * step], 1, step)


@dataclass(frozen=True)
class AxisField:
    """The pixels that the positions along the rows or columns of a map read.

    `phases` are the intervals that the first positions read through kernels, as if the image had no borders; None for a
    position that reads nothing. There are none if no path from the image is made of kernels alone.
    """

    image_side: int
    num_positions: int
    phases: tuple[Interval | None, ...] = ((0, 0),)
    advance: int = 1  # position i + len(phases) reads what position i does, shifted by these pixels
    is_global: bool = False  # some path reads the entire axis, through a mean, a gate or attention
    misalignment: Fraction = Fraction(0)  # largest distance in pixels between the centers of branches that met
    unread: tuple[int, int] = (0, 0)  # pixels at both ends that slices and strides have left out

    @property
    def has_local_path(self) -> bool:
        """Whether some path from the image is made of kernels alone."""
        return bool(self.phases)

    @property
    def stride(self) -> Fraction:
        """Mean distance in pixels between the intervals of neighbouring positions: the product of all strides."""
        return Fraction(self.advance, len(self.phases))

    @property
    def size(self) -> int:
        """Pixels of the largest interval."""
        return max((last - first + 1 for first, last in filter(None, self.phases)), default=0)

    @property
    def offset(self) -> int:
        """First pixel of the first position that reads any; negative in the padding."""
        return next((interval[0] for interval in self.phases if interval is not None), 0)

    def at(self, position: int) -> Interval | None:
        """First and last pixel that a position reads through kernels."""
        if not self.has_local_path:
            return None
        repeats, phase = divmod(position, len(self.phases))
        interval, shift = self.phases[phase], repeats * self.advance
        return interval and (interval[0] + shift, interval[1] + shift)

    def through(self, pattern: TapPattern, num_positions: int) -> Self:
        """The field after an operation with this pattern and this number of outputs."""
        if not self.has_local_path:
            return replace(self, num_positions=num_positions)
        period, unread = len(self.phases), self._unread_after(pattern, num_positions)
        repeats = period // math.gcd(period, pattern.inputs)
        phases = tuple(hull(map(self.at, pattern.taps(output))) for output in range(repeats * pattern.outputs))
        advance = self.advance * repeats * pattern.inputs // period
        after = replace(self, num_positions=num_positions, phases=phases, advance=advance, unread=unread)
        return after._with_shortest_period()

    def _unread_after(self, pattern: TapPattern, num_positions: int) -> tuple[int, int]:
        """Pixels left out after an operation; padding brings none back."""
        last_position = self.num_positions - 1
        read = {tap for output in range(num_positions) for tap in pattern.taps(output) if 0 <= tap <= last_position}
        if {0, last_position} <= read:
            return self.unread
        ends = (min(read), max(read)) if read else ()
        first, last = hull(map(self.at, ends)) or (self.image_side, -1)
        return (max(self.unread[0], first), max(self.unread[1], self.image_side - 1 - last))

    def made_global(self, name: str) -> Self:
        """The field after a reduction over all positions, which must read the image up to less than a stride."""
        if self.has_local_path and max(self.unread) >= self.stride:
            positions = f"{self.num_positions} {name} that do not cover the image"
            raise UnknownReceptiveField(f"it treats {positions} as the entire axis")
        return replace(self, phases=(), is_global=True)

    def joined(self, other: Self) -> Self:
        """The field where two branches meet; both must have a local path, or neither.

        Raises: UnknownReceptiveField for different strides.
        """
        assert self.has_local_path == other.has_local_path
        misalignment = max(self.misalignment, other.misalignment)
        if not self.has_local_path:
            num_positions = max(self.num_positions, other.num_positions)
            return replace(self, num_positions=num_positions, misalignment=misalignment)
        if self.stride != other.stride:
            raise UnknownReceptiveField(f"branches with strides of {self.stride} and {other.stride} pixels meet")
        period = math.lcm(len(self.phases), len(other.phases))
        pairs = [(self.at(position), other.at(position)) for position in range(period)]
        distances = [Fraction(abs(sum(a) - sum(b)), 2) for a, b in pairs if a and b]
        met = replace(
            self,
            phases=tuple(map(hull, pairs)),
            advance=int(self.stride * period),
            misalignment=max([misalignment, *distances]),
            unread=(min(self.unread[0], other.unread[0]), min(self.unread[1], other.unread[1])),
        )
        return met._with_shortest_period()

    def _with_shortest_period(self) -> Self:
        """The same field with as few phases as describe it."""
        period = len(self.phases)
        for shorter in (one for one in range(1, period) if period % one == 0 == self.advance * one % period):
            candidate = replace(self, phases=self.phases[:shorter], advance=self.advance * shorter // period)
            if all(candidate.at(position) == self.at(position) for position in range(period)):
                return candidate
        return self


def hull(intervals: Iterable[Interval | None]) -> Interval | None:
    """The smallest interval around all of them, None around none."""
    present = [*filter(None, intervals)]
    return (min(first for first, _ in present), max(last for _, last in present)) if present else None
