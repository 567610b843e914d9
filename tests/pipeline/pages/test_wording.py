"""Numbers in words, as terminals and pages show them."""

from __future__ import annotations

import pytest

from models.analysis.receptive_field import ReceptiveField
from models.analysis.stages import Sketch
from pipeline.pages.wording import (
    TYPOGRAPHIC,
    byte_count,
    field_words,
    fixed,
    interval_words,
    pair_words,
    percent,
    plural,
    rate,
    shape_words,
    share,
    short_count,
    significant,
    sketch_footnote,
)

LOCAL = ReceptiveField(1435, 32.0, -217)
BOTH = LOCAL._replace(is_global=True)
GLOBAL = ReceptiveField(is_global=True)
NONE = ReceptiveField()


@pytest.mark.parametrize(
    ("rows", "columns", "words"),
    [
        (LOCAL, LOCAL._replace(size=7), "1,435x7 px"),
        (BOTH, BOTH, "1,435x1,435 px + global"),
        (BOTH, LOCAL, "1,435x1,435 px + all rows"),
        (LOCAL, BOTH, "1,435x1,435 px + all columns"),
        (GLOBAL, GLOBAL, "global"),
        (LOCAL, GLOBAL, "1,435 px x all"),
        (GLOBAL, LOCAL, "all x 1,435 px"),
        (GLOBAL, BOTH, "global"),
        (NONE, NONE, "unknown"),
    ],
)
def test_a_field_has_its_local_and_its_global_part(rows: ReceptiveField, columns: ReceptiveField, words: str) -> None:
    assert field_words(rows, columns) == words
    typeset = words.replace("px", "p").replace("x", "×").replace(" p", "\N{NO-BREAK SPACE}px")
    assert field_words(rows, columns, signs=TYPOGRAPHIC) == typeset


def test_a_pair_is_one_number_where_both_are_equal() -> None:
    pairs = [(32.0, 32.0), (1024, 1.5), (-3, None), (None, 7), (None, None)]
    assert [pair_words(*pair) for pair in pairs] == ["32", "1,024x1.5", "-3x-", "-x7", ""]
    assert pair_words(-3, None, signs=TYPOGRAPHIC) == "−3×-"  # the second stands for no number


def test_counts_have_four_digits_or_all_of_them() -> None:
    counts = [0, 999_999, 1_000_000, 11_689_512, 118_013_952, 1_814_073_344, 15_470_264_320]
    assert [short_count(count) for count in counts] == [
        "0", "999,999", "1.000 M", "11.69 M", "118.0 M", "1.814 G", "15.47 G",
    ]  # fmt: skip


def test_bytes_have_three_digits_and_binary_units() -> None:
    counts = [92, 10 * 2**10, 591_015_328, 2**30, 100 * 2**30]
    assert [byte_count(count) for count in counts] == ["0.09 KiB", "10.0 KiB", "564 MiB", "1.00 GiB", "100 GiB"]


def test_a_share_above_zero_is_not_called_zero() -> None:
    assert [percent(*share) for share in ((0, 9), (1, 1000), (1, 100), (2, 3), (0, 0))] == [
        "0%", "<1%", "1%", "67%", "0%",
    ]  # fmt: skip


def test_other_numbers_read_as_people_write_them() -> None:
    assert [rate(speed) for speed in (0.1234, 84.53, 1264.2)] == ["0.123", "84.5", "1,264"]
    assert [plural(count, "layer") for count in (0, 1, 1200)] == ["0 layers", "1 layer", "1,200 layers"]
    assert [shape_words((3, 224, 224)), shape_words((10,)), shape_words(())] == ["3x224x224", "10", ""]
    assert [interval_words((-3, 1045)), interval_words(None)] == ["-3 to 1,045", "none"]
    assert interval_words((-3, 1_234_567), signs=TYPOGRAPHIC) == "−3 to 1,234,567"
    assert [fixed(11.68951, 2), significant(-1024.5), significant(1.94, 2)] == ["11.69", "-1,024.5", "1.9"]
    assert [share(0.5, digits=0), share(1, 3), share(0, 0)] == ["50%", "33.3%", "0.0%"]


def test_a_footnote_has_the_numbers_of_the_sketch() -> None:
    sketch = Sketch("stage2", (128, 56, 56), 35, "the field of another stage")
    assert sketch_footnote(sketch) == (
        "The usual sketch of a CNN shows 128x56x56 and a field of 35x35 px after stage2: the field of another stage."
    )
    assert "128×56×56 and a field of 35×35\N{NO-BREAK SPACE}px" in sketch_footnote(sketch, signs=TYPOGRAPHIC)
