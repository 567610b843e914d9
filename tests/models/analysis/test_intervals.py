"""The arithmetic of receptive fields against sets of pixels, written down one by one."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.analysis import intervals as fields
from models.analysis.intervals import Field, Reading

Taps = Callable[[int], set[int]]

WINDOWS = st.builds(
    lambda kernel, stride, padding, dilation: fields.window(kernel, stride=stride, padding=padding, dilation=dilation),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(1, 3),
)
TRANSPOSED = st.builds(
    lambda kernel, stride, padding, dilation: fields.transposed(
        kernel, stride=stride, padding=padding, dilation=dilation
    ),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 2),
)
SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))
READINGS = st.one_of(
    WINDOWS,
    TRANSPOSED,
    SIZES.map(lambda sizes: fields.adaptive(*sizes)),
    SIZES.map(lambda sizes: fields.nearest(*sizes)),
    SIZES.map(lambda sizes: fields.linear(*sizes, corners=False)),
    SIZES.map(lambda sizes: fields.linear(*(size + 1 for size in sizes), corners=True)),
    st.builds(lambda start, step: fields.steps(start, step=step), st.integers(-3, 5), st.integers(1, 3)),
)


def pixels(chain: list[Reading], position: int) -> set[int]:
    """What a position behind a chain of operations reads, by following every tap."""
    places = {position}
    for reading in reversed(chain):
        places = {tap for place in places for tap in reading.taps(place)}
    return places


@settings(max_examples=300)
@given(st.lists(READINGS, max_size=4))
def test_a_field_spans_the_pixels_that_every_tap_leads_to(chain: list[Reading]) -> None:
    field = Field()
    for reading in chain:
        field = field.through(reading)
    for position in range(-7, 13):
        read = pixels(chain, position)
        assert field.at(position) == ((min(read), max(read)) if read else None)


@given(st.lists(st.tuples(st.integers(1, 11), st.integers(1, 4)), min_size=1, max_size=8))
def test_windows_in_a_row_follow_the_recurrence(layers: list[tuple[int, int]]) -> None:
    field, size, jump = Field(), 1, 1
    for kernel, stride in layers:
        field = field.through(fields.window(kernel, stride=stride))
        size, jump = size + (kernel - 1) * jump, jump * stride
        assert (field.size, field.jump, field.offset, field.period) == (size, jump, 0, 1)


def test_a_transposed_convolution_reads_by_turns() -> None:
    # Kernel 3 at stride 2: even outputs are reached by two inputs, odd ones by one; 4 pixels apart before, 2 behind.
    field = Field().through(fields.window(1, stride=4)).through(fields.transposed(3, stride=2))
    assert [field.at(position) for position in range(4)] == [(-4, 0), (0, 0), (0, 4), (4, 4)]
    assert (field.size, field.jump, field.period) == (5, 2, 2)


def test_a_stride_beyond_the_kernel_leaves_positions_that_read_nothing() -> None:
    field = Field().through(fields.transposed(1, stride=3))
    assert [field.at(position) for position in range(4)] == [(0, 0), None, None, (1, 1)]
    assert field.jump == Fraction(1, 3)


def test_a_union_spans_both_branches_and_tells_how_far_their_middles_are_apart() -> None:
    odd = Field().through(fields.window(3, stride=2, padding=1))  # around pixel 0
    even = Field().through(fields.window(2, stride=2))  # around pixel 0.5
    assert fields.union(odd, even).at(0) == (-1, 1)
    assert fields.distance(odd, even) == Fraction(1, 2)
    assert fields.distance(odd, Field().through(fields.window(1, stride=2))) == 0


def test_branches_that_run_apart_have_no_union() -> None:
    with pytest.raises(ValueError, match="branches whose positions are 1 and 2 pixels apart meet"):
        fields.union(Field(), Field().through(fields.window(1, stride=2)))
