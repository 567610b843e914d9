"""The tables of a report as HTML, and its numbers as people read them.

Everything that comes from outside is escaped here. The first cell of a row is its head.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from models.analysis.gradient_extent import Comparison
from models.analysis.intervals import Interval
from models.analysis.report import Report
from models.analysis.stages import both_ways
from models.analysis.summary import Layer, Pixels
from pipeline.pages.figures import DASHES

WHOLE = {(True, True): "image", (True, False): "rows", (False, True): "columns", (False, False): ""}
FEW = 30  # layers that are shown without a click


def table(
    rows: Sequence[Sequence[str]],
    names: Sequence[str],
    *,
    caption: str,
    style: str = "texts1",
    foot: Sequence[str] = (),
) -> str:
    """A table of cells that are HTML already; the style `texts<n>` says how many columns, from the left, are words."""
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = "\n".join(f'<tr><th scope="row">{row[0]}</th>{_cells(row[1:])}</tr>' for row in rows)
    below = f'<tfoot><tr><th scope="row">{foot[0]}</th>{_cells(foot[1:])}</tr></tfoot>' if foot else ""
    said = escape(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{said}"><table class="{style}">'
        f"<caption><span>{said}</span></caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>{below}</table></div>"
    )


def lifecycle(report: Report) -> str:
    """From pixels to scores, with footnotes that the table and they lead to."""
    rows: list[list[str]] = []
    notes: list[str] = []
    for moment in report.moments:
        mark = ""
        if moment.footnote:
            number = len(notes) + 1
            back = f'<a href="#mark{number}" aria-label="back to the table">↩</a>'
            notes.append(f'<li id="note{number}">{escape(_times(moment.footnote))} {back}</li>')
            mark = f'<sup id="mark{number}"><a href="#note{number}" aria-label="note {number}">{number}</a></sup>'
        rows.append([escape(moment.stage) + mark, shape(moment.shape), escape(moment.meaning), seen(moment.field)])
    names = ["stage", "shape", "what it tends to stand for", "one unit sees"]
    below = f'<ol class="notes">{"".join(notes)}</ol>' if notes else ""
    return table(rows, names, caption="The end of every stage, for one image", style="texts4 wrap") + below


def stages(report: Report) -> str:
    """A row a stage with its shares, and the sums."""
    found = report.inspection
    sums = (sum(stage.parameters for stage in report.stages), found.macs, found.activations)
    rows = []
    for stage in report.stages:
        row = [escape(stage.name), shape(stage.shape), f"{stage.layers:,}"]
        for count, total in zip((stage.parameters, stage.macs, stage.activations), sums, strict=True):
            row += [f"{count:,}", f"{count / max(1, total):.1%}"]
        rows.append([*row, seen(stage.field), _number(both_ways(stage.jump_rows, stage.jump_columns))])
    foot = ["all", "", f"{len(found.layers):,}"]
    for total in sums:
        foot += [f"{total:,}", "100%"]
    counts = ["parameters", "share", "multiply-adds", "share", "activations", "share"]
    names = ["stage", "output", "layers", *counts, "one unit sees", "jump, px"]
    caption = "For one image. Output, field and jump are those of the last layer of a stage"
    return table(rows, names, caption=caption, foot=[*foot, "", ""])


def squares(report: Report) -> str:
    """How large a square holds which share of the effective field, and the receptive field; '' where none is known."""
    field, side = report.effective, max(report.inspection.image[1:])
    if field is None:
        return ""
    rows = []
    for (share, length), dashes in zip(field.sides.items(), DASHES, strict=True):
        line = _sample(f'stroke="#fff" stroke-width="2" stroke-dasharray="{dashes}"')
        number = f'<data id="effective-field-{100 * share:.0f}" value="{length}">{length:,} px</data>'
        rows.append([f"{line}{share:.0%}", number, f"{length / side:.0%}", f"{field.area(share):.1%}"])
    window = window_of(report, field.layer)
    if window is not None:
        line = _sample('stroke="#ff9d4a" stroke-width="4"')
        rows.append([f"{line}receptive field", f"{pixels(window)} px", f"{max(window) / side:.0%}", ""])
    names = ["energy inside", "side", "of the image’s side", "of its pixels"]
    return table(
        rows,
        names,
        caption="The smallest squares around the middle of the field; of one near a border, only what is inside counts",
    )


def check(comparisons: Sequence[Comparison]) -> str:
    """Pixels by rules beside those by gradient."""
    rows = []
    for one in comparisons:
        verdict = "equal" if one.field == one.gradient else "within, cut by a border"
        said = verdict if one.agrees else '<span class="bad">differ</span>'
        rows.append(
            [escape(one.layer), one.axis, _interval(one.field), _interval(one.gradient), f"{one.image:,}", said]
        )
    names = ["layer", "along", "pixels by rules", "pixels by gradient", "image, px", "they are"]
    caption = "One unit in the middle of each map, on images larger than its field where the network takes such"
    return table(rows, names, caption=caption, style="texts2")


def layers(report: Report) -> str:
    """A table for each stage, which a click opens; columns that say nothing of this network are left out."""
    found = report.inspection.layers
    extras = {
        "sees all of": [WHOLE[layer.rows.whole, layer.columns.whole] for layer in found],
        "misaligned, px": [f"{layer.spread:g}" if layer.spread else "" for layer in found],
        "separable": ["" if layer.separable is None else f"{layer.separable:.3f}" for layer in found],
    }
    extras = {name: cells for name, cells in extras.items() if any(cells)}
    rows: dict[str, list[list[str]]] = {}
    for layer, *more in zip(found, *extras.values(), strict=True):
        rows.setdefault(layer.stage, []).append([*_row(layer), *more])
    counts = ["parameters", "multiply-adds", "activations"]
    names = ["layer", "kind", "output", *counts, "field, px", "jump, px", "offset, px", *extras]
    parts = []
    for stage in report.stages:
        costs = f"{short(stage.parameters)} parameters", f"{short(stage.macs)} multiply-adds"
        facts = (many(stage.layers, "layer"), shape(stage.shape), *costs, seen(stage.field))
        said = "".join(f"<span>{fact}</span>" for fact in facts)
        inside = table(rows[stage.name], names, caption=f"Layers of {stage.name}, for one image", style="texts2 quiet")
        shown = " open" if len(found) <= FEW else ""
        parts.append(f"<details{shown}><summary><b>{escape(stage.name)}</b>{said}</summary>{inside}</details>")
    return "\n".join(parts)


def comparison(reports: Sequence[Report], images_per_second: Sequence[float]) -> str:
    """A row a network, each number with an id that ends in the number of its row."""
    rows = []
    for row, (report, speed) in enumerate(zip(reports, images_per_second, strict=True), start=1):
        told, whole = report.facts, report.inspection.first_whole
        numbers = {
            "parameters": (report.inspection.parameters, f"{told['params_millions']:,.2f}"),
            "gmacs": (told["gmacs"], f"{told['gmacs']:,.3f}"),
            "receptive-field": (told.get("receptive_field_px"), f"{told.get('receptive_field_px', 0):,.0f}"),
            "effective-field": (
                told.get("effective_receptive_field_px"),
                f"{told.get('effective_receptive_field_px', 0):,.0f}",
            ),
            "training-memory": (report.memory.total, f"{report.memory.total / 2**20:,.0f}"),
            "images-per-second": (speed, rate(speed)),
        }
        cells = [
            "" if value is None else f'<data id="{key}-{row}" value="{value:.12g}">{said}</data>'
            for key, (value, said) in numbers.items()
        ]
        seen_from = f"<code>{escape(whole.place)}</code>" if whole else ""
        rows.append([escape(report.name), shape(report.inspection.image), *cells, seen_from])
    names = ["network", "image", "parameters, M", "multiply-adds, G", "receptive field, px", "effective field, px"]
    names += ["training memory, MiB", "images/s", "whole image from"]
    caption = "Images per second are measured, in evaluation, on the machine that made this page"
    return table(rows, names, caption=caption)


def window_of(report: Report, name: str) -> Pixels | None:
    """The size of the receptive field behind the last layer of a name, None where no windows lead there."""
    windows = [layer.window for layer in report.inspection.layers if layer.name == name and layer.window is not None]
    return windows[-1].size if windows else None


def seen(field: str) -> str:
    """What a unit sees, from the report's words."""
    return escape(_times(field).replace(" px", "\N{NO-BREAK SPACE}px"))


def shape(sides: Sequence[int]) -> str:
    """A shape in words: 3×224×224."""
    return "×".join(map(str, sides))


def pixels(sides: Pixels) -> str:
    """One number where rows and columns are alike, else both."""
    return _number(both_ways(*sides))


def many(count: int, thing: str) -> str:
    """So many things."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def short(count: int) -> str:
    """Four digits and a unit, or the number itself below a million."""
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if count >= size:
            digits = max(0, 4 - len(str(int(count / size))))
            return f"{count / size:,.{digits}f} {unit}"
    return f"{count:,}"


def percent(part: float, total: float) -> str:
    """A share in whole percent; what is there at all is not told as 0%."""
    share = part / max(1, total)
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def in_bytes(count: int) -> str:
    """Bytes with three digits in KiB, MiB or GiB, of 2^10, 2^20 and 2^30, as on a GPU's own display."""
    unit, size = ("GiB", 2**30) if count >= 2**30 else ("MiB", 2**20) if count >= 2**20 else ("KiB", 2**10)
    digits = 0 if count >= 100 * size else 1 if count >= 10 * size else 2
    return f"{count / size:,.{digits}f} {unit}"


def rate(images: float) -> str:
    """Images a second with three digits and more."""
    return f"{images:,.0f}" if images >= 100 else f"{images:.3g}"


def _row(layer: Layer) -> list[str]:
    rows, columns = layer.rows, layer.columns
    pairs = ((rows.size, columns.size), (rows.jump, columns.jump), (rows.offset, columns.offset))
    size, jump, offset = (_number(both_ways(*pair)) for pair in pairs)
    counts = (f"{count:,}" for count in (layer.parameters, layer.macs, layer.activations))
    return [escape(layer.place), escape(layer.kind), shape(layer.shape), *counts, size, jump, offset]


def _cells(cells: Sequence[str]) -> str:
    return "".join(f"<td>{cell}</td>" for cell in cells)


def _sample(style: str) -> str:
    return f'<svg width="40" height="16" aria-hidden="true"><line x1="3" y1="8" x2="37" y2="8" {style}/></svg>'


def _interval(pixels: Interval | None) -> str:
    return "none" if pixels is None else f"{pixels[0]:,} to {pixels[1]:,}".replace("-", "−")


def _number(said: str) -> str:
    """The same as it is printed, with signs for times and minus."""
    return said.replace("x", "×").replace("-", "−")


def _times(said: str) -> str:
    """The same with multiplication signs between numbers."""
    return re.sub(r"(?<=\d)x(?=\d)|(?<= )x(?= )", "×", said)
