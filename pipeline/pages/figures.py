"""The figures of a report as SVG, from plain numbers: fields along the depth, shares, memory, where a unit looks.

Lengths across are percent and those down are pixels, so that a figure takes the width it is given and its words keep
their size; only the heat map, a square, scales as a whole. Colours are the variables of the page that shows them and
follow it from light to dark: the classes are those of page.html.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.pages.labels import LETTER, Box, Circle, Label, place_labels

DEPTH_HEIGHT, SCATTER_HEIGHT = 280, 320  # px
HEAT_SIDE = 336  # px at most: more is not seen, and only makes the page heavy
# On any photograph: light lines on dark ones, told apart by their dashes too.
DASHES = ("none", "7 3", "2 3", "10 3 2 3")
HEAT = ((20, 14, 40), (84, 15, 109), (187, 55, 84), (249, 142, 9), (252, 255, 164))  # even to the eye, as Inferno is
DECADES = 3  # of energy that are told apart


class Step(NamedTuple):
    """A layer on the way through a network, and the side of its field in pixels, None where no windows lead."""

    layer: str
    stage: str
    side: float | None


class Bar(NamedTuple):
    """A length, and what is written beside it."""

    name: str
    length: float
    said: str


class Stack(NamedTuple):
    """Lengths one behind the other, and what is written above them."""

    name: str
    lengths: Sequence[float]
    said: str


class Dot(NamedTuple):
    """A point with a name, its place on both axes, and an area."""

    name: str
    across: float
    up: float
    area: float


def fields_along_depth(
    steps: Sequence[Step], *, image_side: float, covering: int | None = None, whole: int | None = None
) -> str:
    """The side of the field behind every layer, on a logarithmic scale, stage beside stage.

    `covering` is the place of the first layer whose field is as large as the image, `whole` that of the first that
    sees the whole image otherwise; both are marked. Half of the width goes to the stages alike, half by their layers.
    """
    columns = _columns([step.stage for step in steps])
    top = math.log2(max([image_side, *(step.side for step in steps if step.side)]) * 1.4)
    parts = list(_bands(steps, columns))
    for power in range(0, int(top) + 1, 1 if top < 6 else 2):
        y = _down(2**power, top)
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="-8" y="{y + 4}" text-anchor="end">{2**power:,}</text>')
    y = _down(image_side, top)
    parts.append(f'<line class="side" x1="0" x2="100%" y1="{y}" y2="{y}"/>')
    parts.append(f'<text x="0" dx="6" y="{y - 11}">image {image_side:,.0f} px</text>')
    if whole is not None:
        parts.append(f'<line class="whole" x1="{columns[whole][0]}%" x2="100%" y1="{y}" y2="{y}"/>')
    parts += _walk(steps, columns, top=top)
    if covering is not None:
        at = _down(steps[covering].side or 1, top)
        parts.append(f'<circle class="open" cx="{columns[covering][0]}%" cy="{at}" r="5"/>')
    if whole is not None:
        parts.append(_at(columns[whole][0], y, inside='<path class="full" d="M0 -8 8 0 0 8 -8 0Z"/>'))
    known = [step.side for step in steps if step.side] or [0]
    told = f"Receptive field along {len(steps)} layers, from {known[0]:,g} to {known[-1]:,g} px"
    return _plot(f"{told}; the image has {image_side:,g}", parts, height=DEPTH_HEIGHT + 24)


def bars(rows: Sequence[Bar], *, title: str) -> str:
    """A horizontal bar for each row, from the longest of all, with words at its end."""
    longest = max((row.length for row in rows), default=0) or 1
    parts = []
    for place, row in enumerate(rows):
        y, width = 28 * place, round(52 * row.length / longest, 2)
        parts.append(f'<text x="-10" y="{y + 15}" text-anchor="end">{escape(_short(row.name))}</text>')
        parts.append(f'<rect class="bar" x="0" y="{y + 3}" width="{width}%" height="16" rx="2"/>')
        parts.append(f'<text class="strong" x="{width}%" dx="7" y="{y + 15}">{escape(row.said)}</text>')
    told = "; ".join(f"{row.name} {row.said}" for row in rows)
    return _plot(f"{title}: {told}", parts, height=28 * len(rows))


def stacks(rows: Sequence[Stack], *, names: Sequence[str]) -> str:
    """A bar of several parts for each row, all on one scale, with words above; part i has the class `part<i>`."""
    longest = max((sum(row.lengths) for row in rows), default=0) or 1
    parts, told = [], []
    for place, row in enumerate(rows):
        y, x = 54 * place, 0.0
        parts.append(f'<text class="strong" x="0" y="{y + 12}">{escape(row.name)}</text>')
        parts.append(f'<text class="strong" x="100%" y="{y + 12}" text-anchor="end">{escape(row.said)}</text>')
        parts.append(f'<rect class="track" x="0" y="{y + 20}" width="100%" height="20" rx="3"/>')
        for number, (name, length) in enumerate(zip(names, row.lengths, strict=True)):
            width = 100 * length / longest
            parts.append(
                f'<rect class="part{number % 4}" x="{x:.3f}%" y="{y + 20}" width="{width:.3f}%" height="20" '
                f'stroke="var(--paper)"><title>{escape(name)} {length / max(1, sum(row.lengths)):.0%}</title></rect>'
            )
            x += width
        told.append(f"{row.name} {row.said}")
    return _plot("; ".join(told), parts, height=54 * len(rows) - 10)


def heat_map(
    energy: NDArray[np.float64],
    *,
    photograph: NDArray[np.uint8] | None,
    center: tuple[float, float],
    squares: Sequence[float],
    field: tuple[float, float] | None,
) -> str:
    """How much each pixel counts, energy (H, W), over a photograph (H, W, 3) in grey or alone; squares around a center.

    Rows come first in `center`, which is counted from the middle of the first pixel, and in `field`, the sides of the
    receptive field; what leaves the image is cut. Its colours are the logarithm of the energy over three decades.
    Raises: ValueError for a photograph of another size.
    """
    height, width = energy.shape
    if photograph is not None and photograph.shape != (height, width, 3):
        raise ValueError(
            f"the photograph is {photograph.shape}, the energy {energy.shape}: give one (H, W, 3) as large"
        )
    png = base64.b64encode(_png(energy, photograph)).decode()
    shown = "auto" if min(height, width) >= 100 else "pixelated"
    parts = [f'<image href="data:image/png;base64,{png}" width="{width}" height="{height}" image-rendering="{shown}"/>']
    pen, limits = max(height, width) / 224, (height, width)
    if field is not None:
        style = f'stroke="#ff9d4a" stroke-width="{3 * pen:g}"'
        parts.append(_frame(center, field, limits=limits, inset=1.5 * pen, style=style))
    for side, dashes in zip(squares, DASHES, strict=False):
        dashed = " ".join(f"{float(dash) * pen:g}" for dash in dashes.split()) if dashes != "none" else "none"
        for ink, thick in (("#000", 2.6), ("#fff", 1.3)):
            style = f'stroke="{ink}" stroke-width="{thick * pen:g}" stroke-dasharray="{dashed}"'
            parts.append(_frame(center, (side, side), limits=limits, inset=4.5 * pen, style=style))
    told = f"Heat map of what moves the unit, with squares of {', '.join(f'{side:g}' for side in squares)} pixels"
    return (
        f'<svg class="heat" viewBox="0 0 {width} {height}" role="img" aria-label="{told}">'
        f'<g fill="none">{"".join(parts)}</g></svg>'
    )


def scatter(dots: Sequence[Dot], *, across: str, up: str, reference: tuple[float, str] | None = None) -> str:
    """Points with names on two logarithmic axes, named by their units, the areas of their circles as given.

    `reference` is a height with its name. Names keep clear of each other and of circles at any width.
    """
    parts = []
    wide = _Scale.over([dot.across for dot in dots])
    high = _Scale.over([*(dot.up for dot in dots), *([reference[0]] if reference else [])])
    for tick in wide.ticks():
        parts.append(f'<line class="grid" x1="{wide(tick):.2f}%" x2="{wide(tick):.2f}%" y1="0" y2="{SCATTER_HEIGHT}"/>')
        parts.append(f'<text x="{wide(tick):.2f}%" y="{SCATTER_HEIGHT + 17}" text-anchor="middle">{tick:,g}</text>')
    parts.append(f'<text x="100%" y="{SCATTER_HEIGHT + 36}" text-anchor="end">{escape(across)}</text>')
    parts.append(f'<text x="-38" y="-10">{escape(up)}</text>')
    for tick in high.ticks():
        y = SCATTER_HEIGHT * (1 - high(tick) / 100)
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="-8" y="{y + 4:.1f}" text-anchor="end">{tick:,g}</text>')
    taken = []
    if reference is not None:
        y = SCATTER_HEIGHT * (1 - high(reference[0]) / 100)
        parts.append(f'<line class="side" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="0" dx="6" y="{y - 6:.1f}">{escape(reference[1])}</text>')
        taken = [Box(0, y - 18, 12 + LETTER * len(reference[1]), y)]
    most = max((dot.area for dot in dots), default=0) or 1
    circles = [
        Circle(wide(dot.across) / 100, SCATTER_HEIGHT * (1 - high(dot.up) / 100), 4 + 16 * math.sqrt(dot.area / most))
        for dot in dots
    ]
    names = [dot.name for dot in dots]
    parts += map(_labelled, place_labels(names, circles, height=SCATTER_HEIGHT, taken=taken))
    return _plot(f"{', '.join(names)}: {up} over {across}", parts, height=SCATTER_HEIGHT + 42)


class _Scale(NamedTuple):
    """A logarithmic axis from 0 to 100 %."""

    low: float
    high: float

    @classmethod
    def over(cls, values: Sequence[float]) -> _Scale:
        """One with room around the values."""
        ends = [math.log10(value) for value in values if value > 0] or [0.0]
        room = max(0.12, 0.14 * (max(ends) - min(ends)))
        return cls(min(ends) - room, max(ends) + room)

    def __call__(self, value: float) -> float:
        """The place of a value in percent."""
        return 100 * (math.log10(max(value, 10**self.low)) - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round numbers on it, at least three where one digit is enough for them."""
        found: list[float] = []
        for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
            powers = [10.0**exponent for exponent in range(math.floor(self.low), math.ceil(self.high) + 1)]
            found = [digit * power for power in powers for digit in digits]
            found = [tick for tick in found if self.low <= math.log10(tick) <= self.high]
            if len(found) >= 3:
                break
        return found


def _labelled(label: Label) -> str:
    """A circle with its name, and a line between them where they are apart."""
    circle, name, leader = label.circle, escape(label.name), ""
    if label.away > circle.radius + 14:
        start, y = circle.radius / label.away, label.dy - (4 if label.dy > 0 else 0)
        leader = (
            f'<line class="leader" x1="{label.dx * start:.1f}" y1="{y * start:.1f}" x2="{label.dx:.1f}" y2="{y:.1f}"/>'
        )
    return _at(
        100 * circle.across,
        circle.down,
        inside=f'{leader}<circle class="dot" r="{circle.radius:.1f}"><title>{name}</title></circle>'
        f'<text class="strong" x="{label.dx:.1f}" y="{label.dy:.1f}" text-anchor="{label.anchor}">{name}</text>',
    )


def _columns(stages: Sequence[str]) -> list[tuple[float, float]]:
    """From where to where each layer reaches, in percent."""
    runs = [len(list(run)) for _, run in itertools.groupby(stages)]
    columns, left = [], 0.0
    for count in runs:
        each = (50 / len(runs) + 50 * count / len(stages)) / count
        columns += [(round(left + each * place, 3), round(left + each * (place + 1), 3)) for place in range(count)]
        left += each * count
    return columns


def _bands(steps: Sequence[Step], columns: Sequence[tuple[float, float]]) -> list[str]:
    """A band for each stage, every other shaded, with its name where there is room."""
    parts, first = [], 0
    for number, (name, run) in enumerate(itertools.groupby(steps, key=lambda step: step.stage)):
        last = first + len(list(run)) - 1
        left, width = columns[first][0], columns[last][1] - columns[first][0]
        if number % 2 == 0:
            parts.append(f'<rect class="band" x="{left:.3f}%" y="0" width="{width:.3f}%" height="{DEPTH_HEIGHT}"/>')
        if width > 4:
            said = escape(_short(name)).replace("stage", '<tspan class="spare">stage</tspan>')
            parts.append(
                f'<text x="{left + width / 2:.3f}%" y="{DEPTH_HEIGHT + 18}" text-anchor="middle">{said}</text>'
            )
        first = last + 1
    return parts


def _walk(steps: Sequence[Step], columns: Sequence[tuple[float, float]], *, top: float) -> list[str]:
    """The line, which waits where no windows lead, its end, and what to point at in every layer."""
    known = [place for place, step in enumerate(steps) if step.side]
    if not known:
        return []
    path, y = "", 0.0
    for step, (left, right) in itertools.islice(zip(steps, columns, strict=True), known[-1] + 1):
        if step.side:
            y = _down(step.side, top)
            path += f"V{y:g}" if path else f"M{left:g} {y:g}"
        path += f"H{right:g}" if path else ""
    end = steps[known[-1]].side or 0
    return [
        *(
            f'<rect class="hit" x="{left}%" y="0" width="{right - left:.3f}%" height="{DEPTH_HEIGHT}">'
            f"<title>{escape(step.layer)}: {f'{step.side:,g} px' if step.side else 'no windows'}</title></rect>"
            for step, (left, right) in zip(steps, columns, strict=True)
        ),
        f'<svg width="100%" height="{DEPTH_HEIGHT}" viewBox="0 0 100 {DEPTH_HEIGHT}" preserveAspectRatio="none">'
        f'<path class="line" d="{path}"/></svg>',
        f'<text class="strong" x="{columns[known[-1]][1]}%" dy="-9" y="{y}" text-anchor="end">{end:,g} px</text>',
    ]


def _down(side: float, top: float) -> float:
    """The height of a side in px from above; 1 px is the ground, `top` the logarithm of what is highest."""
    return round(DEPTH_HEIGHT * (1 - math.log2(side) / top), 1)


def _frame(
    center: tuple[float, float], sides: tuple[float, float], *, limits: tuple[int, int], inset: float, style: str
) -> str:
    """A rectangle around a center, both rows first, as far as it lies so far inside the limits."""
    (top, bottom), (left, right) = (
        (max(inset, middle + 0.5 - side / 2), min(limit - inset, middle + 0.5 + side / 2))
        for middle, side, limit in zip(center, sides, limits, strict=True)
    )
    return f'<rect x="{left:g}" y="{top:g}" width="{right - left:g}" height="{bottom - top:g}" {style}/>'


def _png(energy: NDArray[np.float64], photograph: NDArray[np.uint8] | None) -> bytes:
    """The picture of a heat map, logarithmic; over a photograph the more opaque the hotter."""
    largest = float(np.quantile(energy, 0.999)) or float(energy.max())  # a few pixels do not darken all others
    heat = np.clip(1 + np.log10(np.maximum(energy / largest, 1e-9)) / DECADES, 0, 1)
    steps = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(heat, steps, channel) for channel in zip(*HEAT, strict=True)], axis=-1)
    if photograph is not None:
        grey = 0.45 * photograph.mean(-1, keepdims=True) + 20  # (H, W, 3) -> (H, W, 1)
        colours = grey + (colours - grey) * heat[..., None]
    image = Image.fromarray(colours.round().astype(np.uint8))
    image.thumbnail((HEAT_SIDE, HEAT_SIDE), Image.Resampling.BOX)
    buffer = io.BytesIO()
    image.quantize(128, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _short(name: str) -> str:
    return name if len(name) <= 11 else f"{name[:10]}…"


def _at(across: float, down: float, *, inside: str) -> str:
    """What is drawn in px from a point at a share of the width."""
    return f'<svg x="{across:.3f}%" y="{down:.1f}" overflow="visible">{inside}</svg>'


def _plot(told: str, parts: Sequence[str], *, height: float) -> str:
    return f'<svg class="plot" height="{height:g}" role="img" aria-label="{escape(told)}">{"".join(parts)}</svg>'
