"""A report as one page: a file of HTML that brings all it shows, asks no network for anything and runs no script.

What stays the same is in page.html. What comes from outside (names, warnings) is escaped. What a test or a machine may
want is a `<data>` with an id and the number itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.analysis.cost import Memory
from models.analysis.report import EFFECTIVE_SHARE, Report
from models.analysis.summary import Inspection
from models.analysis.trace import ITSELF
from pipeline.pages import tables
from pipeline.pages.figures import Bar, Dot, Stack, Step, bars, fields_along_depth, heat_map, scatter, stacks
from pipeline.pages.tables import in_bytes, many, percent, pixels, rate, shape, short

TEMPLATE = Path(__file__).with_name("page.html")


def render(report: Report, *, photograph: NDArray[np.uint8] | None = None) -> str:
    """The page of one network; the photograph, uint8 (H, W, 3), lies under its effective field.

    Raises: ValueError for a photograph of another size than the field's energy.
    """
    found = report.inspection
    counts = f"{many(len(found.layers), 'layer')} in {many(len(found.stages), 'stage')}"
    return _document(
        report.name,
        brand="report of a network",
        said=f"From images of {shape(found.image)} to {_outcome(found.layers[-1].shape)}: {counts}.",
        head=_key_facts(report) + _warnings([report]),
        sections={
            "Lifecycle": tables.lifecycle(report),
            "Figures": _figures(report),
            "Stages": tables.stages(report),
            "Effective field": _effective(report, photograph),
            "Check by gradient": _check(report),
            "Layers": tables.layers(report),
        },
    )


def _outcome(sides: Sequence[int]) -> str:
    return f"{sides[0]:,} scores" if len(sides) == 1 else shape(sides) or "one number"


def render_comparison(reports: Sequence[Report], *, images_per_second: Sequence[float]) -> str:
    """The page of several networks side by side, with how many images each takes in a second.

    Raises: ValueError unless there is at least one network, and a speed for each.
    """
    if not reports or len(reports) != len(images_per_second):
        raise ValueError(f"{len(reports)} reports and {len(images_per_second)} speeds: give one speed for each report")
    names = ", ".join(report.name for report in reports)
    return _document(
        f"{many(len(reports), 'network')} side by side",
        brand="comparison of networks",
        said=f"{escape(names)}.",
        head=tables.comparison(reports, images_per_second) + _warnings(reports),
        sections={"Figures": _clouds(reports, images_per_second) + _memory(reports)},
    )


class _Fact(NamedTuple):
    """A key number: its id, its name, itself (None where there is none), itself in words, and what it is of."""

    key: str
    label: str
    value: float | None
    said: str
    note: str

    def html(self) -> str:
        """The number for people, and for machines where there is one."""
        if self.value is None:
            return escape(self.said)
        number, space, unit = self.said.partition(" ")
        behind = f'{space}<span class="unit">{unit}</span>' if unit else ""
        return f'<data id="{self.key}" value="{self.value:.12g}">{number}{behind}</data>'


def _facts(report: Report) -> list[_Fact]:
    found, told, total = report.inspection, report.facts, report.memory.total
    frozen = found.parameters - found.trainable
    exact = f"{found.parameters:,}, " if short(found.parameters) != f"{found.parameters:,}" else ""
    effective = told.get("effective_receptive_field_px")
    return [
        _Fact("parameters", "Parameters", found.parameters, short(found.parameters),
              exact + (f"{frozen:,} of them frozen" if frozen else "all trainable")),
        _Fact("gmacs", "Multiply-adds", told["gmacs"], short(found.macs), f"for one image of {shape(found.image)}"),
        _receptive_field(report),
        _Fact("effective-field", "Effective field", effective,
              "not measured" if effective is None else f"{effective:,.0f} px",
              "" if effective is None else f"side of the square with {EFFECTIVE_SHARE:.0%} of the gradient’s energy"),
        _Fact("training-memory", "Training memory", total, in_bytes(total),
              f"batch of {report.batch_size:,}, {report.precision}"),
    ]  # fmt: skip


def _receptive_field(report: Report) -> _Fact:
    found, side = report.inspection, report.facts.get("receptive_field_px")
    last, whole = found.last_window, found.first_whole
    said, note = "none", "there are no windows along rows and columns"
    if found.unknown is not None:
        said, note = "unknown", "for the reason below"
    elif last is not None and last.window is not None and side is not None:
        said, note = f"{pixels(last.window.size)} px", f"{side / max(found.image[1:]):.2g} × the image’s side"
        note += "; by other paths all of it" if last.whole else ""
    elif whole is not None:
        said, note = "whole image", f"from {whole.place} on"
    return _Fact("receptive-field", "Receptive field", side, said, note)


def _key_facts(report: Report) -> str:
    boxes = (
        f"<div><dt>{fact.label}</dt><dd>{fact.html()}</dd><dd>{escape(fact.note)}</dd></div>\n"
        for fact in _facts(report)
    )
    return f'<dl class="facts">\n{"".join(boxes)}</dl>'


def _warnings(reports: Sequence[Report]) -> str:
    """What to beware of, with the network's name where there are several; '' where there is nothing."""
    items = []
    for report in reports:
        unknown = report.inspection.unknown
        name = f"<b>{escape(report.name)}</b>: " if len(reports) > 1 else ""
        items += [f"<li>{name}{escape(one)}</li>" for one in [*([unknown] if unknown else []), *report.warnings]]
    return f'<aside class="note"><h2>Worth knowing</h2><ul>{"".join(items)}</ul></aside>' if items else ""


def _figures(report: Report) -> str:
    measures = {
        "Parameters": {stage.name: stage.parameters for stage in report.stages},
        "Multiply-adds": {stage.name: stage.macs for stage in report.stages},
        "Activations": {stage.name: stage.activations for stage in report.stages},
    }
    figures = []
    for title, counts in measures.items():
        total = sum(counts.values())
        rows = [Bar(name, count, f"{short(count)} · {percent(count, total)}") for name, count in counts.items()]
        drawing = f'<div class="bars">{bars(rows, title=title)}</div>'
        figures.append(_figure(title, drawing, said=f"{short(total)} in all, by stage"))
    return f'{_depth(report.inspection)}<div class="three">{"".join(figures)}</div>{_memory([report])}'


def _depth(found: Inspection) -> str:
    layers, (_, height, width) = found.layers, found.image
    covering = [
        place
        for place, layer in enumerate(layers)
        if layer.window and layer.window.size.rows >= height and layer.window.size.columns >= width
    ]
    whole = [place for place, layer in enumerate(layers) if layer.whole]
    if not whole and not any(layer.window for layer in layers):
        return ""
    keys = [_key('<path class="line" d="M0 9H7V3H16"/>', "field through convolutions and poolings")]
    if covering:
        said = f"the first as large as the image: {layers[covering[0]].place}"
        keys.append(_key('<circle class="open" cx="8" cy="6" r="4"/>', said))
    if whole:
        said = f"the first to see the whole image at once: {layers[whole[0]].place}"
        keys.append(_key('<path class="full" d="M8 0 14 6 8 12 2 6Z"/>', said))
    drawing = fields_along_depth(
        [Step(layer.place, layer.stage, layer.window and max(layer.window.size)) for layer in layers],
        image_side=max(height, width),
        covering=covering[0] if covering else None,
        whole=whole[0] if whole else None,
    )
    said = "Side in pixels on a logarithmic scale, layer by layer; it dips where a branch sees less"
    return _figure("Receptive field", f'<div class="depth">{drawing}</div>{_keys(keys)}', said=said)


def _memory(reports: Sequence[Report]) -> str:
    """A bar for each network, and what its parts are, with their bytes where it is one."""
    rows, keys = [], []
    for report in reports:
        batch = f"batch of {report.batch_size:,}, {report.precision}"
        name = f"{report.name} · {batch}" if len(reports) > 1 else batch
        rows.append(Stack(name, report.memory, in_bytes(report.memory.total)))
    for place, name in enumerate(Memory._fields):
        size, total = reports[0].memory[place], reports[0].memory.total
        said = f" <b>{in_bytes(size)}</b> {percent(size, total)}" if len(reports) == 1 else ""
        keys.append(f'<li><span class="swatch part{place}"></span><span>{name}{said}</span></li>')
    said = "Tensors of one step; activations grow with the batch, the rest does not"
    return _figure("Memory of training", stacks(rows, names=Memory._fields) + _keys(keys), said=said)


def _effective(report: Report, photograph: NDArray[np.uint8] | None) -> str:
    field = report.effective
    if field is None:
        return ""
    drawing = heat_map(
        field.energy.numpy(),
        photograph=photograph,
        center=field.center,
        squares=list(field.sides.values()),
        field=tables.window_of(report, field.layer),
    )
    with_what = f", with {escape(report.measured)}" if report.measured else ""
    said = f"What moves the middle unit of <code>{escape(field.layer or ITSELF)}</code>{with_what}"
    ramp = "0.001 <span class='ramp'></span> 1"
    scale = f"<p class='said'>squared gradient, its 99.9th percentile as 1: <span class='scale'>{ramp}</span></p>"
    figure = f"<figure>{drawing}{scale}</figure>"
    return f'<p class="said">{said}</p><div class="seen">{figure}{tables.squares(report)}</div>'


def _check(report: Report) -> str:
    """How many fields agree, and the table of them, open where one does not."""
    if report.comparisons is None:
        return ""
    count, agreeing = len(report.comparisons), sum(one.agrees for one in report.comparisons)
    numbers = (
        f'<data id="agreeing" value="{agreeing}">{agreeing:,}</data> of '
        f'<data id="compared" value="{count}">{count:,}</data>'
    )
    shown = " open" if agreeing < count else ""
    summary = f"<summary><b>{many(count, 'comparison')}</b></summary>"
    return (
        f'<p class="said">{numbers} fields that follow from kernels and strides are where the gradient is.</p>'
        f"<details{shown}>{summary}{tables.check(report.comparisons)}</details>"
    )


def _clouds(reports: Sequence[Report], speeds: Sequence[float]) -> str:
    fastest = max(range(len(reports)), key=lambda place: speeds[place])
    said = f"Areas are images per second, at most {rate(speeds[fastest])} ({escape(reports[fastest].name)})"
    sides = {max(report.inspection.image[1:]) for report in reports}
    image = (float(max(sides)), f"image {max(sides):,} px") if len(sides) == 1 else None
    costs = [(one.name, one.facts, speed) for one, speed in zip(reports, speeds, strict=True)]
    sizes = [Dot(name, facts["gmacs"], facts["params_millions"], speed) for name, facts, speed in costs]
    fields = [
        Dot(name, facts["gmacs"], facts["receptive_field_px"], speed)
        for name, facts, speed in costs
        if "receptive_field_px" in facts
    ]
    drawings = {
        "Parameters": scatter(sizes, across="multiply-adds, G", up="parameters, M"),
        "Receptive field": fields
        and scatter(fields, across="multiply-adds, G", up="receptive field, px", reference=image),
    }
    figures = (
        _figure(f"{title} against multiply-adds", f'<div class="scatter">{drawing}</div>', said=said)
        for title, drawing in drawings.items()
        if drawing
    )
    return f'<div class="pair">{"".join(figures)}</div>'


def _figure(title: str, drawing: str, *, said: str) -> str:
    return f"<figure><figcaption><h3>{title}</h3><p>{said}</p></figcaption>{drawing}</figure>"


def _keys(items: Sequence[str]) -> str:
    return f'<ul class="keys">{"".join(items)}</ul>'


def _key(drawing: str, said: str) -> str:
    return f'<li><svg width="16" height="12" aria-hidden="true">{drawing}</svg><span>{escape(said)}</span></li>'


def _document(name: str, *, brand: str, said: str, head: str, sections: Mapping[str, str]) -> str:
    """The whole page under a name; sections without content are left out."""
    shown = {title: body for title, body in sections.items() if body}
    ids = {title: "-".join(["section", *title.lower().split()]) for title in shown}
    links = "\n".join(f'<a href="#{ids[title]}">{title}</a>' for title in shown)
    body = "\n".join(f'<section id="{ids[title]}">\n<h2>{title}</h2>\n{shown[title]}\n</section>' for title in shown)
    page = Template(TEMPLATE.read_text(encoding="utf-8"))
    return page.substitute(title=escape(name), brand=brand, said=said, head=head, links=links, sections=body)
