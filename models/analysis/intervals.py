"""Receptive fields along one axis in exact arithmetic: the interval of pixels that each position of a map reads.

For layers in a row this is the recurrence r_l = r_{l-1} + (K_l - 1) j_{l-1}, j_l = j_{l-1} S_l. Intervals are
absolute, so that branches can be joined; after a resize, where neighbouring outputs differ, they have a period.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, Self

Interval = tuple[int, int]  # first and last pixel; those outside the image lie in the padding


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
class Intervals:
    """The interval of pixels that each position of an axis reads, without regard to the borders of the image."""

    phases: tuple[Interval | None, ...] = ((0, 0),)  # of the first positions, None for those that read nothing
    advance: int = 1  # position i + len(phases) reads what position i does, shifted by these pixels

    @property
    def period(self) -> int:
        """Number of positions after which the intervals repeat."""
        return len(self.phases)

    @property
    def stride(self) -> Fraction:
        """Mean distance between neighbouring positions in pixels: the product of all strides."""
        return Fraction(self.advance, self.period)

    @property
    def size(self) -> int:
        """Pixels of the largest interval."""
        return max((last - first + 1 for first, last in filter(None, self.phases)), default=0)

    @property
    def offset(self) -> int:
        """First pixel of the first position that reads any; negative in the padding."""
        return next((interval[0] for interval in self.phases if interval is not None), 0)

    def at(self, position: int) -> Interval | None:
        """First and last pixel that a position reads."""
        repeats, phase = divmod(position, self.period)
        interval, shift = self.phases[phase], repeats * self.advance
        return interval and (interval[0] + shift, interval[1] + shift)

    def through(self, pattern: TapPattern) -> "Intervals":
        """The intervals after an operation with this pattern."""
        repeats = self.period // math.gcd(self.period, pattern.inputs)
        phases = tuple(hull(map(self.at, pattern.taps(output))) for output in range(repeats * pattern.outputs))
        return _simplified(Intervals(phases, self.advance * repeats * pattern.inputs // self.period))


def hull(intervals: Iterable[Interval | None]) -> Interval | None:
    """The smallest interval around all of them, None around none."""
    present = [*filter(None, intervals)]
    return (min(first for first, _ in present), max(last for _, last in present)) if present else None


def union(one: Intervals, other: Intervals) -> Intervals:
    """The intervals where two branches meet. Raises: ValueError for different strides."""
    if one.stride != other.stride:
        raise ValueError(f"branches with strides of {one.stride} and {other.stride} pixels meet")
    period = math.lcm(one.period, other.period)
    phases = tuple(hull((one.at(position), other.at(position))) for position in range(period))
    return _simplified(Intervals(phases, int(one.stride * period)))


def distance(one: Intervals, other: Intervals) -> Fraction:
    """Largest distance in pixels between the centers of two branches' intervals; 0 for aligned branches."""
    pairs = [(one.at(position), other.at(position)) for position in range(math.lcm(one.period, other.period))]
    return max((Fraction(abs(sum(a) - sum(b)), 2) for a, b in pairs if a and b), default=Fraction(0))


def _simplified(intervals: Intervals) -> Intervals:
    """The same intervals with the shortest period."""
    period, advance = intervals.period, intervals.advance
    for shorter in (divisor for divisor in range(1, period) if period % divisor == 0 == advance * divisor % period):
        candidate = Intervals(intervals.phases[:shorter], advance * shorter // period)
        if all(candidate.at(position) == intervals.at(position) for position in range(period)):
            return candidate
    return intervals
