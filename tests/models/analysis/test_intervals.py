"""The arithmetic of receptive fields against enumerated sets of pixels."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.analysis.intervals import AxisField, TapPattern, UnknownReceptiveField

KERNELS = st.builds(
    lambda size, stride, padding, dilation: TapPattern.kernel(size, stride=stride, padding=padding, dilation=dilation),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(1, 3),
)
TRANSPOSED = st.builds(
    lambda size, stride, padding, dilation: TapPattern.transposed(
        size, stride=stride, padding=padding, dilation=dilation
    ),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 2),
)
SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))
PATTERNS = st.one_of(
    KERNELS,
    TRANSPOSED,
    SIZES.map(lambda sizes: TapPattern.adaptive(*sizes)),
    SIZES.map(lambda sizes: TapPattern.nearest(*sizes)),
    SIZES.map(lambda sizes: TapPattern.linear(*sizes, align_corners=False)),
    SIZES.map(lambda sizes: TapPattern.linear(*(size + 1 for size in sizes), align_corners=True)),
    st.builds(lambda start, step: TapPattern.slice(start, step=step), st.integers(-3, 5), st.integers(1, 3)),
)


PIXELS = AxisField(image_side=64, num_positions=64)


def strided(kernel_size: int, stride: int, padding: int = 0) -> AxisField:
    pattern = TapPattern.kernel(kernel_size, stride=stride, padding=padding)
    return PIXELS.through(pattern, PIXELS.num_positions // stride)


def pixels_read(patterns: list[TapPattern], position: int) -> set[int]:
    """The pixels that a position after these operations reads, by following every tap."""
    positions = {position}
    for pattern in reversed(patterns):
        positions = {tap for output in positions for tap in pattern.taps(output)}
    return positions


@settings(max_examples=300)
@given(st.lists(PATTERNS, max_size=4))
def test_intervals_span_the_pixels_of_all_taps(patterns: list[TapPattern]) -> None:
    field = PIXELS
    for pattern in patterns:
        field = field.through(pattern, 13)
    for position in range(-7, 13):
        pixels = pixels_read(patterns, position)
        assert field.at(position) == ((min(pixels), max(pixels)) if pixels else None)


@given(st.lists(st.tuples(st.integers(1, 11), st.integers(1, 4)), min_size=1, max_size=8))
def test_kernels_in_a_row_follow_the_recurrence(layers: list[tuple[int, int]]) -> None:
    field, size, jump = PIXELS, 1, 1
    for kernel_size, stride in layers:
        field = field.through(TapPattern.kernel(kernel_size, stride=stride), 64)
        size, jump = size + (kernel_size - 1) * jump, jump * stride
        assert (field.size, field.stride, field.offset, len(field.phases)) == (size, jump, 0, 1)


def test_transposed_convolution_alternates_its_intervals() -> None:
    # Kernel 3 at stride 2: even outputs read two inputs, odd ones read one; the stride falls from 4 pixels to 2.
    field = strided(1, 4).through(TapPattern.transposed(3, stride=2), 32)
    assert [field.at(position) for position in range(4)] == [(-4, 0), (0, 0), (0, 4), (4, 4)]
    assert (field.size, field.stride, len(field.phases)) == (5, 2, 2)


def test_transposed_stride_beyond_the_kernel_leaves_positions_without_pixels() -> None:
    field = PIXELS.through(TapPattern.transposed(1, stride=3), 192)
    assert [field.at(position) for position in range(4)] == [(0, 0), None, None, (1, 1)]
    assert field.stride == Fraction(1, 3)


def test_joined_branches_span_both_and_report_their_misalignment() -> None:
    odd = strided(3, 2, padding=1)  # around pixel 0
    even = strided(2, 2)  # around pixel 0.5
    assert odd.joined(even).at(0) == (-1, 1)
    assert odd.joined(even).misalignment == Fraction(1, 2)
    assert odd.joined(strided(1, 2)).misalignment == 0


def test_branches_with_different_strides_are_refused() -> None:
    with pytest.raises(UnknownReceptiveField, match="branches with strides of 1 and 2 pixels meet"):
        PIXELS.joined(strided(1, 2))
