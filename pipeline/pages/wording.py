"""Numbers in words, for terminals and pages: counts, bytes, shares, shapes, receptive fields."""

from collections.abc import Sequence
from typing import NamedTuple

from models.analysis.intervals import Interval
from models.analysis.receptive_field import ReceptiveField
from models.analysis.stages import Sketch


class Signs(NamedTuple):
    """The characters between numbers and before negative ones, and the space between a number and its unit."""

    times: str
    minus: str
    space: str


PLAIN = Signs("x", "-", " ")  # terminals and files
TYPOGRAPHIC = Signs("×", "−", "\N{NO-BREAK SPACE}")  # pages
GLOBAL_PATHS = {(True, True): " + global", (True, False): " + all rows", (False, True): " + all columns"}


def scaled_count(count: int) -> tuple[str, str]:
    """Four digits with M or G, or every digit below a million, and no unit."""
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if count >= size:
            digits = max(0, 4 - len(str(int(count / size))))
            return f"{count / size:,.{digits}f}", unit
    return f"{count:,}", ""


def scaled_bytes(count: int) -> tuple[str, str]:
    """Three digits with KiB, MiB or GiB, which are 2^10, 2^20 and 2^30 bytes."""
    unit, size = ("GiB", 2**30) if count >= 2**30 else ("MiB", 2**20) if count >= 2**20 else ("KiB", 2**10)
    digits = 0 if count >= 100 * size else 1 if count >= 10 * size else 2
    return f"{count / size:,.{digits}f}", unit


def short_count(count: int) -> str:
    """A count such as "11.69 M"."""
    return " ".join(scaled_count(count)).rstrip()


def byte_count(count: int) -> str:
    """A size such as "564 MiB"."""
    return " ".join(scaled_bytes(count))


def percent(part: float, total: float) -> str:
    """A share of a count in integer percent; one that rounds to 0 but is not 0 reads "<1%"."""
    return "<1%" if 0 < part / max(1, total) < 0.005 else share(part, total, digits=0)


def share(part: float, total: float = 1, *, digits: int = 1) -> str:
    """A share of a count in percent with this number of decimals."""
    return f"{part / max(1, total):.{digits}%}"


def integer(value: float | None) -> str:
    """A number without decimals, nothing for None."""
    return "" if value is None else fixed(value, 0)


def fixed(value: float, digits: int, *, signs: Signs = PLAIN) -> str:
    """A number with this many decimals."""
    return f"{value:,.{digits}f}".replace("-", signs.minus)


def significant(value: float, digits: int = 6, *, signs: Signs = PLAIN) -> str:
    """A number rounded to this many significant digits."""
    return f"{value:,.{digits}g}".replace("-", signs.minus)


def rate(images_per_second: float) -> str:
    """Images per second with at least three digits."""
    return f"{images_per_second:,.0f}" if images_per_second >= 100 else f"{images_per_second:.3g}"


def hours(value: float) -> str:
    """Hours with two decimals, "<0.01" for a few seconds."""
    return "<0.01" if 0 < value < 0.005 else f"{value:,.2f}"


def plural(count: int, noun: str) -> str:
    """A count with its noun: "1 layer", "69 layers"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def shape_words(shape: Sequence[int], *, signs: Signs = PLAIN) -> str:
    """A shape such as "3x224x224"."""
    return signs.times.join(map(str, shape))


def pair_words(rows: float | None, columns: float | None, *, signs: Signs = PLAIN) -> str:
    """Two numbers such as "5x7"; one where both are equal; "-" for one that is None, nothing where both are."""
    if rows is None and columns is None:
        return ""
    along_rows, along_columns = ("-" if one is None else significant(one, signs=signs) for one in (rows, columns))
    return along_rows if rows == columns else f"{along_rows}{signs.times}{along_columns}"


def field_words(rows: ReceptiveField, columns: ReceptiveField, *, signs: Signs = PLAIN) -> str:
    """A receptive field such as "435x435 px", "global", or "43x43 px + global" where a second path is global.

    Along an axis without local paths only the global one is left: "5 px x all".
    """
    if rows.size is not None and columns.size is not None:
        local = f"{rows.size:,}{signs.times}{columns.size:,}{signs.space}px"
        return local + GLOBAL_PATHS.get((rows.is_global, columns.is_global), "")
    if rows.is_global and columns.is_global:
        return "global"
    if not rows.is_global and not columns.is_global:
        return "unknown"
    sizes = ["all" if axis.size is None else f"{axis.size:,}{signs.space}px" for axis in (rows, columns)]
    return f" {signs.times} ".join(sizes)


def interval_words(pixels: Interval | None, *, signs: Signs = PLAIN) -> str:
    """The first and last pixel, "-3 to 45"."""
    return "none" if pixels is None else " to ".join(fixed(pixel, 0, signs=signs) for pixel in pixels)


def sketch_footnote(sketch: Sketch, *, signs: Signs = PLAIN) -> str:
    """How the usual sketch of a CNN differs from this stage, and why."""
    shape = shape_words(sketch.shape, signs=signs)
    field = f"{sketch.field}{signs.times}{sketch.field}{signs.space}px"
    return f"The usual sketch of a CNN shows {shape} and a field of {field} after {sketch.stage}: {sketch.reason}."
