"""Which pixels of the image one position of a map reads along one axis: the receptive field as exact arithmetic.

The recurrence r_l = r_{l-1} + (K_l - 1) j_{l-1}, j_l = j_{l-1} S_l holds for layers in a row, and is what `through`
comes to for windows. Here it is kept with the place of every field, so that branches can be joined, and with a period,
so that transposed convolutions and resizing, whose neighbours read unlike windows, stay exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

Interval = tuple[int, int]  # first and last pixel; negative and large ones lie in the padding


class Reading(NamedTuple):
    """How an operation reads a map: its output i the positions `taps(i)`, and output i + outputs the same + inputs."""

    taps: Callable[[int], Iterable[int]]
    outputs: int
    inputs: int


@dataclass(frozen=True)
class Field:
    """The interval of pixels that each position of a map reads, on a plane without borders.

    Position i reads `intervals[i]`, position i + len(intervals) the same `advance` pixels further. None reads
    nothing: a transposed convolution whose stride is larger than its kernel leaves such positions.
    """

    intervals: tuple[Interval | None, ...] = ((0, 0),)
    advance: int = 1

    @property
    def period(self) -> int:
        """After how many positions the intervals repeat."""
        return len(self.intervals)

    @property
    def jump(self) -> Fraction:
        """Pixels from one position to the next, on average: the product of all strides."""
        return Fraction(self.advance, self.period)

    @property
    def size(self) -> int:
        """Pixels of the widest interval."""
        return max((last - first + 1 for first, last in filter(None, self.intervals)), default=0)

    @property
    def offset(self) -> int:
        """The first pixel that the first position to read any reads, counted from the image's edge into it."""
        return next((interval[0] for interval in self.intervals if interval is not None), 0)

    def at(self, position: int) -> Interval | None:
        """The first and last pixel that a position reads."""
        repeats, phase = divmod(position, self.period)
        interval = self.intervals[phase]
        return interval and (interval[0] + repeats * self.advance, interval[1] + repeats * self.advance)

    def through(self, reading: Reading) -> Field:
        """The field behind an operation that reads this map so."""
        repeats = self.period // math.gcd(self.period, reading.inputs)
        outputs = range(repeats * reading.outputs)
        intervals = tuple(hull(self.at(tap) for tap in reading.taps(output)) for output in outputs)
        return _shortest(Field(intervals, self.advance * repeats * reading.inputs // self.period))

    def over(self, count: int) -> Interval | None:
        """The first and last pixel that the first `count` positions read together."""
        return hull(self.at(position) for position in range(count))


def hull(intervals: Iterable[Interval | None]) -> Interval | None:
    """The smallest interval around all of them, None around none."""
    some = [interval for interval in intervals if interval is not None]
    return (min(first for first, _ in some), max(last for _, last in some)) if some else None


def union(one: Field, other: Field) -> Field:
    """The field where two branches meet.

    Raises: ValueError when their jumps differ: one would outrun the other, and no single field describes both.
    """
    if one.jump != other.jump:
        raise ValueError(f"branches whose positions are {one.jump} and {other.jump} pixels apart meet")
    period = math.lcm(one.period, other.period)
    intervals = tuple(hull((one.at(position), other.at(position))) for position in range(period))
    return _shortest(Field(intervals, int(one.jump * period)))


def distance(one: Field, other: Field) -> Fraction:
    """Pixels between the middles of the fields of two branches that meet; 0 where they are aligned."""
    pairs = [(one.at(position), other.at(position)) for position in range(math.lcm(one.period, other.period))]
    return max((Fraction(abs(sum(a) - sum(b)), 2) for a, b in pairs if a and b), default=Fraction(0))


def window(kernel: int, *, stride: int = 1, padding: int = 0, dilation: int = 1) -> Reading:
    """A convolution's or pooling's: `kernel` positions, each `dilation` from the next."""
    span = kernel * dilation
    return Reading(
        lambda output: range(output * stride - padding, output * stride - padding + span, dilation), 1, stride
    )


def transposed(kernel: int, *, stride: int = 1, padding: int = 0, dilation: int = 1) -> Reading:
    """A transposed convolution's: the positions whose window, forwards, would hold the output."""

    def taps(output: int) -> Iterable[int]:
        reached = [output + padding - tap * dilation for tap in range(kernel)]
        return [place // stride for place in reached if place % stride == 0]

    return Reading(taps, stride, 1)


def adaptive(before: int, after: int) -> Reading:
    """Adaptive pooling's from `before` positions to `after`: as even windows as there can be, each as small."""
    common = math.gcd(before, after)

    def taps(output: int) -> Iterable[int]:
        return range(output * before // after, -(-(output + 1) * before // after))

    return Reading(taps, after // common, before // common)


def nearest(before: int, after: int) -> Reading:
    """Resizing's from `before` positions to `after` by repeating or leaving out."""
    common = math.gcd(before, after)
    return Reading(lambda output: [output * before // after], after // common, before // common)


def linear(before: int, after: int, *, corners: bool) -> Reading:
    """Resizing's by weights of two neighbours; `corners` lays the first and last positions of both on each other."""
    inputs, outputs = (before - 1, after - 1) if corners else (before, after)
    common, edge = math.gcd(inputs, outputs), Fraction(0) if corners else Fraction(1, 2)  # from border to middle

    def taps(output: int) -> Iterable[int]:
        place = (output + edge) * inputs / outputs - edge
        return range(math.floor(place), math.ceil(place) + 1)

    return Reading(taps, outputs // common, inputs // common)


def steps(start: int, *, step: int = 1) -> Reading:
    """A slice's from `start` on, or, where that is negative, a padding's."""
    return Reading(lambda output: [start + output * step], 1, step)


def _shortest(field: Field) -> Field:
    for period in range(1, field.period):
        advance = field.advance * period // field.period
        candidate = Field(field.intervals[:period], advance)
        repeats = field.period % period == 0 and field.advance * period % field.period == 0
        if repeats and all(candidate.at(position) == field.at(position) for position in range(field.period)):
            return candidate
    return field
