"""The pages of a report and of a comparison: one HTML file each, without scripts and requests.

The templates hold layout and sentences, `wording` the numbers. Numbers for machines are `<data>` elements with an id.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from models.analysis.effective_field import EffectiveField
from models.analysis.report import EFFECTIVE_SHARE, Report
from models.analysis.summary import NetworkSummary, Pixels
from models.analysis.trace import NETWORK_ITSELF
from pipeline.pages import wording
from pipeline.pages.charts import Dot, heat_map, layer_widths, line_over_layers, scatter, series_style

TEMPLATES = Path(__file__).with_name("templates")
SIGNS = wording.TYPOGRAPHIC
WORDS = ("byte_count", "fixed", "integer", "percent", "plural", "rate", "scaled_bytes", "scaled_count", "share")
FILTERS = {
    **{name: getattr(wording, name) for name in (*WORDS, "hours", "short_count", "significant")},
    "anchor": lambda name: "section-" + name.lower().replace(" ", "-"),
    "exact": lambda value: f"{value:.12g}",  # for machines
    "field": lambda layer: wording.field_words(layer.rows, layer.columns, signs=SIGNS),
    "footnote": partial(wording.sketch_footnote, signs=SIGNS),
    "interval": partial(wording.interval_words, signs=SIGNS),
    "pair": lambda pair: wording.pair_words(*pair, signs=SIGNS),
    "shape": partial(wording.shape_words, signs=SIGNS),
}


def render_report(report: Report) -> str:
    """Make the page of one network. Raises: ValueError for a sample image of another size than the field."""
    heat = report.effective and _heat_map(report.effective, report)
    page = template("report.html")
    return page.render(report=report, depth=_depth_chart(report.summary), heat=heat, effective_share=EFFECTIVE_SHARE)


def render_comparison(reports: Sequence[Report], *, images_per_second: Sequence[float]) -> str:
    """Make the page of several networks, with the speed of each. Raises: ValueError for none, or other numbers."""
    if not reports or len(reports) != len(images_per_second):
        raise ValueError(f"{len(reports)} reports and {len(images_per_second)} speeds: give one speed for each report")
    series = [series_style(place, len(reports)) for place in range(len(reports))]
    scatters, page = _scatter_plots(reports, images_per_second), template("comparison.html")
    return page.render(reports=reports, images_per_second=images_per_second, series=series, scatters=scatters)


def template(name: str) -> Template:
    """Load a template with the filters of all pages."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters |= FILTERS
    return environment.get_template(name)


def _depth_chart(summary: NetworkSummary) -> dict[str, object] | None:
    """The chart of the receptive field of each layer, None where no layer has one."""
    layers, (_, height, width) = summary.layers, summary.image_shape
    sizes = [layer.local_size for layer in layers]
    sides, stages = [size and max(size) for size in sizes], [layer.stage for layer in layers]
    covers = (place for place, size in enumerate(sizes) if size and size.rows >= height and size.columns >= width)
    covering = next(covers, None)
    first_global = next((place for place, layer in enumerate(layers) if layer.is_global), None)
    if first_global is None and not any(sizes):
        return None
    chart = line_over_layers(sides, stages, image_side=max(height, width), covering=covering, first_global=first_global)
    return {
        "chart": chart,
        "layers": list(zip(layers, sides, layer_widths(stages), strict=True)),
        "covering": None if covering is None else layers[covering],
    }


def _heat_map(field: EffectiveField, report: Report) -> dict[str, object]:
    """The heat map, with a frame for each square of the field and for the receptive field of its layer."""
    sizes = [layer.local_size for layer in report.summary.layers if layer.name == field.layer and layer.local_size]
    pen = max(field.energy.shape) / 224  # px of the image, the unit of the lines' width
    frames = [{"class": "field", **_frame(field, size, inset=1.5 * pen)} for size in sizes[-1:]]
    for place, side in enumerate(field.sides.values()):
        frames.append({"class": f"dash{place}", **_frame(field, Pixels(side, side), inset=4.5 * pen)})
    return {
        "png": heat_map(field.energy.numpy(), report.sample_image),
        "shape": tuple(field.energy.shape),
        "layer": field.layer or NETWORK_ITSELF,
        "field": sizes[-1] if sizes else None,
        "frames": frames,
    }


def _frame(field: EffectiveField, size: Pixels, *, inset: float) -> dict[str, float | str]:
    """The attributes of a rectangle around the center of a field, cut at this distance from the borders."""
    (top, bottom), (left, right) = (
        (max(inset, center + 0.5 - side / 2), min(limit - inset, center + 0.5 + side / 2))
        for center, side, limit in zip(field.center, size, field.energy.shape, strict=True)
    )
    return {"x": left, "y": top, "width": right - left, "height": bottom - top}


def _scatter_plots(reports: Sequence[Report], images_per_second: Sequence[float]) -> Mapping[str, str]:
    """Parameters and receptive fields against multiply-adds, by title."""
    sides = {max(report.summary.image_shape[1:]) for report in reports}
    image = (max(sides), f"image {wording.integer(max(sides))} px") if len(sides) == 1 else None
    points = [(report.name, report.facts, speed) for report, speed in zip(reports, images_per_second, strict=True)]
    costs = [Dot(name, facts["gmacs"], facts["params_millions"], speed) for name, facts, speed in points]
    fields = [Dot(name, facts["gmacs"], facts.get("receptive_field_px", 0.0), speed) for name, facts, speed in points]
    return {
        "Parameters": scatter(costs, x="multiply-adds, G", y="parameters, M"),
        "Receptive field": scatter(fields, x="multiply-adds, G", y="receptive field, px", reference=image),
    }
