"""Charts from plain numbers: axes as SVG by matplotlib, the heat map as PNG.

An SVG takes its colours from the CSS variables of the page, so that it follows the page from light to dark, and its
font from the text around it.
"""

import base64
import io
import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple
from xml.etree import ElementTree

import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Patch, RegularPolygon
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Affine2D
from numpy.typing import NDArray
from PIL import Image

from pipeline.pages.wording import integer, significant

# matplotlib knows no CSS variables: it draws with placeholders, which are replaced in the SVG.
COLOURS = ("paper", "ink", "muted", "line", "band", "blue", "orange")
PAPER, INK, MUTED, LINE, BAND, BLUE, ORANGE = (f"#0000{number:02x}" for number in range(1, len(COLOURS) + 1))
TEXT = {"svg.fonttype": "none", "text.parse_math": False, "font.size": 12, "text.color": INK}
AXES = {"xtick.color": MUTED, "ytick.color": MUTED, "grid.color": LINE}
STYLE = matplotlib.style.context(["default", TEXT, AXES])
DEPTH_WIDTH = 1040  # px, of the chart over the layers
LETTER = 7.5  # px, a generous width of a letter
HEAT_SIDE = 336  # px at most: more only makes the page larger
HEAT_DECADES = 3
RING, LARGEST_RING = 2.0, 14.0  # px, the radius for few images, and what is added for all
GROUP = "{http://www.w3.org/2000/svg}g"
ElementTree.register_namespace("", "http://www.w3.org/2000/svg")


class Dot(NamedTuple):
    """A point of a scatter plot; areas are relative to the largest."""

    name: str
    x: float
    y: float
    area: float


class ConfidenceBins(NamedTuple):
    """Images by confidence: mean confidence, accuracy and number of images of each bin (B,); NaN where it is empty."""

    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    images: NDArray[np.int64]


def series_style(place: int, count: int) -> str:
    """The CSS variables that distinguish one of several series: evenly spaced hues, hollow and solid in turn."""
    return f"--hue: {360 * place // count}; --fill: {0.8 if place % 2 else 0.15}"


def layer_widths(stages: Sequence[str]) -> list[float]:
    """The share of the x axis for each layer: half is split evenly among stages, half among layers."""
    runs = [len(list(run)) for _, run in itertools.groupby(stages)]
    return [0.5 / len(runs) / count + 0.5 / len(stages) for count in runs for _ in range(count)]


@STYLE
def line_over_layers(
    sizes: Sequence[float | None],
    stages: Sequence[str],
    *,
    image_side: int,
    covering: int | None,
    first_global: int | None,
) -> Markup:
    """Pixels along the depth on a logarithmic scale, over a band for each stage.

    A layer without a size repeats the one before. A dashed line marks the side of the image. A ring marks the layer
    `covering`; from the layer `first_global` on the line of the image is solid.
    """
    values = np.array([size or math.nan for size in sizes])
    known = np.flatnonzero(~np.isnan(values)).tolist()
    for place in range(known[0] + 1, known[-1]) if known else ():
        values[place] = sizes[place] or values[place - 1]
    edges = np.concatenate([[0.0], np.cumsum(layer_widths(stages))])
    top = 1.4 * float(np.nanmax([image_side, *values]))
    ticks = [2**power for power in range(0, int(math.log2(top)) + 1, 1 if top < 64 else 2)]
    axes = _axes(DEPTH_WIDTH, 310, margins=(46, 4, 26, 14))
    axes.set_yscale("log", base=2)
    axes.set(xlim=(0, 1), ylim=(1, top))
    axes.set_yticks(ticks, list(map(integer, ticks)))
    axes.grid(axis="y")
    _draw_bands(axes, stages, edges=edges)
    _draw_reference(axes, image_side, name=f"image {integer(image_side)} px")
    if first_global is not None:
        axes.plot([edges[first_global], 1], [image_side] * 2, color=ORANGE, linewidth=4, solid_capstyle="butt")
        diamond = RegularPolygon((0, 0), 4, radius=8, facecolor=ORANGE, edgecolor=PAPER, linewidth=1.5, zorder=4)
        _place(axes, diamond, at=(edges[first_global], image_side))
    axes.stairs(values, edges, baseline=None, color=BLUE, linewidth=2.5, zorder=3)
    if covering is not None:
        ring = Circle((0, 0), 5, facecolor=PAPER, edgecolor=BLUE, linewidth=2.5, zorder=4)
        _place(axes, ring, at=(edges[covering], values[covering]))
    label = f"Receptive field along {len(sizes)} layers of an image of {integer(image_side)} px"
    if known:
        first, last = values[known[0]], values[known[-1]]
        end = (edges[known[-1] + 1], last)
        axes.annotate(f"{significant(last)} px", end, (0, 8), textcoords="offset points", ha="right", weight="bold")
        label += f": from {significant(first)} to {significant(last)} px"
    return _to_svg(axes, label)


@STYLE
def scatter(dots: Sequence[Dot], *, x: str, y: str, reference: tuple[float, str] | None = None) -> Markup:
    """Circles on two logarithmic axes with these names, for a page that names the circles in a legend.

    `reference` is a height with its name. A dot not above 0 on both axes is left out, a plot without dots is empty.
    """
    drawn = [(place, dot) for place, dot in enumerate(dots) if dot.x > 0 and dot.y > 0]
    if not drawn:
        return Markup()
    axes = _axes(440, 370, margins=(46, 14, 44, 28))
    heights = [dot.y for _, dot in drawn] + ([reference[0]] if reference else [])
    axes.set(xscale="log", xlim=_log_limits([dot.x for _, dot in drawn]), yscale="log", ylim=_log_limits(heights))
    axes.grid()
    if reference is not None:
        _draw_reference(axes, reference[0], name=reference[1])
    largest = max(dot.area for dot in dots)
    for place, dot in sorted(drawn, key=lambda one: -one[1].area):  # small ones on top
        radius = 5 + 15 * math.sqrt(dot.area / largest)
        _place(axes, Circle((0, 0), radius, gid=f"dot{place}", zorder=3), at=(dot.x, dot.y))
    axes.annotate(x, (1, 0), (0, -36), "axes fraction", "offset points", ha="right", color=MUTED)
    axes.annotate(y, (0, 1), (-40, 12), "axes fraction", "offset points", color=MUTED)
    for axis in (axes.xaxis, axes.yaxis):
        _set_log_ticks(axis)
    return _to_svg(axes, f"{y} over {x}: {', '.join(dot.name for _, dot in drawn)}", dots=dots)


@STYLE
def pareto_chart(
    names: Sequence[str], costs: Sequence[float | None], *, top1: Sequence[float | None], x: str, best: Sequence[str]
) -> Markup:
    """Top-1 over a cost on a logarithmic axis, with a line through the names in `best`; empty without points."""
    dots = [Dot(*one, 1.0) for one in zip(names, costs, top1, strict=True) if one[1] and one[2] is not None]  # type: ignore[arg-type]  # known values only
    if not dots:
        return Markup()
    axes = _axes(440, 370, margins=(52, 14, 44, 28))
    heights = [dot.y for dot in dots]
    room = max(0.01, 0.12 * (max(heights) - min(heights)))
    axes.set(xscale="log", xlim=_log_limits([dot.x for dot in dots]), ylim=(min(heights) - room, max(heights) + room))
    axes.grid()
    front = sorted((dot for dot in dots if dot.name in best), key=lambda dot: dot.x)
    axes.step([dot.x for dot in front], [dot.y for dot in front], where="post", color=ORANGE, linewidth=1.5)
    for dot in dots:
        place = names.index(dot.name)
        _place(axes, Circle((0, 0), 7, gid=f"dot{place}", zorder=3), at=(dot.x, dot.y))
    axes.annotate(x, (1, 0), (0, -36), "axes fraction", "offset points", ha="right", color=MUTED)
    axes.annotate("top-1", (0, 1), (-40, 12), "axes fraction", "offset points", color=MUTED)
    _set_log_ticks(axes.xaxis)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
    by_place = {name: Dot(name, 1.0, 1.0, 1.0) for name in names}
    return _to_svg(axes, f"Top-1 over {x}: {', '.join(dot.name for dot in dots)}", dots=list(by_place.values()))


@STYLE
def calibration_chart(before: ConfidenceBins, *, with_temperature: ConfidenceBins) -> Markup:
    """Accuracy over confidence, a ring for each bin, the larger the more images it has."""
    axes = _unit_axes(x="confidence", y="accuracy", low=(0.0, 0.0))
    axes.plot([0, 1], [0, 1], color=ORANGE, linewidth=1.5, linestyle=(0, (3.5, 2.5)))
    for bins, colour in ((before, MUTED), (with_temperature, BLUE)):
        for confidence, accuracy, images in zip(*bins, strict=True):
            radius = RING + LARGEST_RING * math.sqrt(images / bins.images.sum())
            ring = Circle((0, 0), radius, fill=False, edgecolor=colour, linewidth=2.0, zorder=3, clip_on=False)
            if images:
                _place(axes, ring, at=(confidence, accuracy))
    return _to_svg(axes, "Accuracy over confidence")


@STYLE
def accuracy_over_coverage(
    coverage: NDArray[np.float64], accuracy: NDArray[np.float64], *, threshold: tuple[float, float | None] | None
) -> Markup:
    """Accuracy of the answered images over their share, with a ring at the threshold."""
    low = max(0.0, math.floor(10 * float(accuracy.min()) - 0.5) / 10)
    axes = _unit_axes(x="answered images", y="accuracy of these", low=(0.0, low))
    axes.plot(coverage, accuracy, color=BLUE, linewidth=2.5, zorder=3)
    if threshold is not None and threshold[1] is not None:
        ring = Circle((0, 0), 5, facecolor=PAPER, edgecolor=BLUE, linewidth=2.5, zorder=4)
        _place(axes, ring, at=(threshold[0], threshold[1]))
    return _to_svg(axes, "Accuracy of the answered images over their share")


def _unit_axes(*, x: str, y: str, low: tuple[float, float]) -> Axes:
    """Axes of two shares, from these ends to 1, in percent."""
    axes = _axes(440, 340, margins=(46, 14, 44, 28))
    axes.set(xlim=(low[0], 1), ylim=(low[1], 1.01))
    axes.grid()
    axes.annotate(x, (1, 0), (0, -36), "axes fraction", "offset points", ha="right", color=MUTED)
    axes.annotate(y, (0, 1), (-40, 12), "axes fraction", "offset points", color=MUTED)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
    return axes


def heat_map(energy: NDArray[np.float64], sample_image: NDArray[np.uint8] | None) -> str:
    """The energy of each pixel (H, W) as a PNG in a data URI, over a grey image (H, W, 3) if one is given.

    Colours are logarithmic over three decades. Raises: ValueError for an image of another size.
    """
    if sample_image is not None and sample_image.shape != (*energy.shape, 3):
        raise ValueError(f"the sample image is {sample_image.shape}, the energy {energy.shape}: H and W must match")
    largest = float(np.quantile(energy, 0.999)) or float(energy.max())  # a few pixels do not darken all others
    heat = np.clip(1 + np.log10(np.maximum(energy / largest, 1e-9)) / HEAT_DECADES, 0, 1)
    colours = 255 * np.asarray(matplotlib.colormaps["inferno"](heat))[..., :3]  # (H, W) -> (H, W, 3)
    if sample_image is not None:
        grey = 0.45 * sample_image.mean(-1, keepdims=True) + 20  # (H, W, 3) -> (H, W, 1)
        colours = grey + (colours - grey) * heat[..., None]
    image = Image.fromarray(colours.round().astype(np.uint8))
    image.thumbnail((HEAT_SIDE, HEAT_SIDE), Image.Resampling.BOX)
    buffer = io.BytesIO()
    image.quantize(128, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _axes(width: int, height: int, *, margins: tuple[int, int, int, int]) -> Axes:
    """Empty axes in a figure of this size in px; margins are left, right, bottom, top."""
    left, right, bottom, top = margins
    box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    axes = Figure(figsize=(width / 72, height / 72), dpi=72).add_axes(box, frameon=False)  # SVG: 72 units per inch
    axes.tick_params(left=False, bottom=False, pad=8)
    return axes


def _draw_bands(axes: Axes, stages: Sequence[str], *, edges: NDArray[np.float64]) -> None:
    """Shade every other stage, and name those with room for a name."""
    names, centers, first = [], [], 0
    for number, (stage, run) in enumerate(itertools.groupby(stages)):
        last = first + len(list(run))
        left, right = edges[first], edges[last]
        if number % 2 == 0:
            axes.axvspan(left, right, color=BAND, linewidth=0, zorder=0)
        num_letters = DEPTH_WIDTH * (right - left) / LETTER
        name = "".join(filter(str.isprintable, stage))  # XML has no control characters
        name = name if len(name) < num_letters else name.removeprefix("stage")
        names.append(name if len(name) < num_letters else "")
        centers.append((left + right) / 2)
        first = last
    axes.set_xticks(centers, names)


def _draw_reference(axes: Axes, height: float, *, name: str) -> None:
    axes.axhline(height, color=ORANGE, linewidth=1.5, linestyle=(0, (3.5, 2.5)))
    start = axes.get_yaxis_transform()  # x from 0 to 1, y in data
    axes.annotate(name, (0, height), (6, -7), start, "offset points", color=MUTED, va="top")


def _place(axes: Axes, shape: Patch, *, at: tuple[float, float]) -> None:
    """Draw a shape, in px, around a point of axes that have their limits."""
    shape.set_transform(Affine2D().translate(*axes.transData.transform(at)))
    axes.add_artist(shape)


def _log_limits(values: Sequence[float]) -> tuple[float, float]:
    """The ends of a logarithmic axis with room around the values."""
    low, high = math.log10(min(values)), math.log10(max(values))
    room = max(0.15, 0.12 * (high - low))
    return 10 ** (low - room), 10 ** (high + room)


def _set_log_ticks(axis: Axis) -> None:
    """Show about four round numbers, for any range."""
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    digits = (1, 2, 5) if decades < 1.6 else (1, 3) if decades < 2.6 else (1,)
    axis.set_major_locator(LogLocator(subs=digits) if decades > 0.7 else MaxNLocator(4))
    axis.set_major_formatter(FuncFormatter(lambda value, _: significant(value)))
    axis.set_minor_locator(NullLocator())


def _to_svg(axes: Axes, label: str, *, dots: Sequence[Dot] = ()) -> Markup:
    """The figure of some axes for a page: in its colours and font, without ids, which would occur twice there."""
    buffer = io.BytesIO()
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.savefig(buffer, format="svg", transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    root.attrib = {"class": "chart", "viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    for child in [child for child in root if child.tag != GROUP]:  # metadata, styles, clip paths
        root.remove(child)
    for place, dot in enumerate(dots):
        for group in root.iterfind(f".//*[@id='dot{place}']"):
            group.attrib |= {"class": "dot", "style": series_style(place, len(dots))}
            for path in group:
                path.attrib.pop("style", None)
            ElementTree.SubElement(group, f"{GROUP[:-1]}title").text = dot.name  # shown where the pointer rests
    for element in root.iter():
        for needless in ("id", "clip-path"):
            element.attrib.pop(needless, None)
        style = re.sub(r"font-family: [^;]*;?", "", element.get("style", ""))
        if "class" not in element.attrib and style:
            element.set("style", re.sub(r"#0000(0\d)", lambda match: f"var(--{COLOURS[int(match[1]) - 1]})", style))
        if "d" in element.attrib:
            element.set("d", re.sub(r"(\.\d\d)\d+", r"\1", " ".join(element.attrib["d"].split())))
    return Markup(ElementTree.tostring(root, encoding="unicode"))
