"""A report in the terminal: facts, lifecycle, stages, layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from models.analysis.gradient_extent import Comparison
from models.analysis.report import EFFECTIVE_SHARE, Report
from models.analysis.stages import both_ways, field_of
from models.analysis.summary import Layer
from models.analysis.trace import ITSELF
from pipeline.cli.console import print_facts
from pipeline.pages.tables import in_bytes, short

WIDE = 120  # columns of a terminal that has room for all
# Whether a small one has room for it.
STAGE_COLUMNS = {
    "stage": True,
    "output": True,
    "layers": False,
    "parameters": True,
    "MACs": True,
    "activations": False,
    "a unit sees": True,
    "jump px": False,
}
LAYER_COLUMNS = {
    "layer": True,
    "kind": True,
    "output": True,
    "parameters": True,
    "MACs": False,
    "activations": False,
    "a unit sees": True,
    "jump px": False,
    "offset px": False,
}
EFFECTIVE = f"effective px ({EFFECTIVE_SHARE:.0%})"
COMPARED_COLUMNS = {
    "network": True,
    "image": False,
    "M parameters": True,
    "GMACs": True,
    "field px": True,
    EFFECTIVE: True,
    "whole image from": False,
    "images/s here": True,
}
WORDS = ("stage", "layer", "kind", "a unit sees", "network", "whole image from")


def print_report(console: Console, report: Report, *, layers: str) -> None:
    """Print all that was found; `layers` is some, those that multiply or read neighbours, all, or none."""
    print_facts(console, facts_of(report))
    for one in report.comparisons or []:
        if not one.agrees:
            text = (
                f"differs: {one.layer} along {one.axis}: pixels {one.field} by propagation, {one.gradient} by gradient"
            )
            console.print(text, highlight=False, markup=False, soft_wrap=True)
    for warning in report.warnings:
        console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)
    console.print(lifecycle_table(report))
    footnotes = [moment.footnote for moment in report.moments if moment.footnote]
    for number, footnote in enumerate(footnotes, start=1):
        console.print(f"{number} {footnote}", highlight=False, markup=False)
    wide = console.width >= WIDE
    console.print(stage_table(report, wide=wide))
    if layers != "none":
        console.print(layer_table(report, every=layers == "all", wide=wide))


def facts_of(report: Report) -> dict[str, str]:
    """The numbers that stand for a network, by name, for people."""
    found, last, whole = report.inspection, report.inspection.last_window, report.inspection.first_whole
    channels, height, width = found.image
    frozen = f", {found.trainable:,} of them trainable" if found.trainable < found.parameters else ""
    facts = {
        "model": f"{report.name} for images of {channels}x{height}x{width}",
        "parameters": f"{found.parameters:,}{frozen}",
        "multiply-adds": f"{short(found.macs)} an image",
    }
    if found.unknown is not None:
        facts["fields"] = found.unknown
    elif last is not None and last.window is not None:
        jump = both_ways(*last.window.jump)
        facts["field"] = f"{field_of(last)} at {last.place}, {jump} px from unit to unit"
        facts["whole image"] = "by its windows alone" if whole is None else _first_in(whole)
        misaligned = max(layer.spread for layer in found.layers)
        if misaligned:
            facts["misaligned"] = f"branches that meet have their middles up to {misaligned:g} px apart"
    else:
        facts["field"] = "no unit is reached through windows alone"
        facts["whole image"] = "in no layer" if whole is None else _first_in(whole)
    if report.effective is not None:
        squares = ", ".join(f"{share:.0%} in {side} px" for share, side in report.effective.sides.items())
        facts["effective"] = f"{squares}: squares that hold so much of the gradient's energy"
        facts["measured"] = f"with {report.measured}"
    facts["memory"] = (
        f"{in_bytes(report.memory.total)} to train on {report.batch_size} images in {report.precision}: "
        + ", ".join(f"{name} {in_bytes(size)}" for name, size in report.memory._asdict().items())
    )
    if saving := separable_saving(report):
        facts["separable"] = saving
    if report.comparisons is not None:
        facts["check"] = checked(report.comparisons)
    return facts


def _first_in(layer: Layer) -> str:
    return f"first in {layer.place}" + (f" ({layer.kind})" if layer.name else "")


def checked(comparisons: Sequence[Comparison]) -> str:
    """How many fields two ways agree on."""
    if not comparisons:
        return "no unit is reached through windows alone"
    inside = [one for one in comparisons if one.inside]
    cut = len(comparisons) - len(inside)
    rest = f", {sum(one.agrees for one in comparisons) - sum(one.agrees for one in inside)} of {cut} hold it, cut"
    return (
        f"{sum(one.agrees for one in inside)} of {len(inside)} fields equal the extent of their gradient"
        f", at the end of each resolution along rows and columns"
        f"{rest + ' by the border of the image' if cut else ''}"
    )


def separable_saving(report: Report) -> str:
    """What depthwise-separable layers cost of the standard convolutions in their place; empty where there are none."""
    ratios = [layer.separable for layer in report.inspection.layers if layer.separable is not None]
    if not ratios:
        return ""
    span = f"{min(ratios):.3f}" + (f" to {max(ratios):.3f}" if max(ratios) > min(ratios) else "")
    return f"{len(ratios)} depthwise layers with their pointwise cost {span} of standard ones: 1/C_out + 1/K^2"


def lifecycle_table(report: Report) -> Table:
    """From pixels to scores."""
    table = Table(
        "stage", "shape", "what it tends to stand for", "a unit sees", title="lifecycle", title_justify="left"
    )
    number = 0
    for moment in report.moments:
        number += bool(moment.footnote)
        shape = ", ".join(["B", *map(str, moment.shape)])
        mark = f" [{number}]" if moment.footnote else ""
        table.add_row(moment.stage, f"({shape})", moment.meaning, moment.field + mark.replace("[", "\\["))
    return table


def stage_table(report: Report, *, wide: bool) -> Table:
    """A row a stage, and their sum; not `wide`, without the columns that a small terminal has no room for."""
    table = _table("stages", STAGE_COLUMNS, wide=wide)
    found, bytes_each = report.inspection, report.bytes_per_number
    for stage in report.stages:
        _add_row(
            table,
            {
                "stage": stage.name,
                "output": "x".join(map(str, stage.shape)),
                "layers": str(stage.layers),
                "parameters": short(stage.parameters),
                "MACs": short(stage.macs),
                "activations": in_bytes(stage.activations * bytes_each),
                "a unit sees": stage.field,
                "jump px": both_ways(stage.jump_rows, stage.jump_columns),
            },
        )
    if found.unused:
        _add_row(table, {"stage": "unused", "parameters": short(found.unused), "a unit sees": "not in evaluation"})
    table.add_section()
    all_of_it = {
        "stage": "all",
        "layers": str(len(found.layers)),
        "parameters": short(found.parameters),
        "MACs": short(found.macs),
        "activations": in_bytes(found.activations * bytes_each),
    }
    _add_row(table, all_of_it)
    return table


def layer_table(report: Report, *, every: bool, wide: bool) -> Table:
    """A row a layer; unless `every`, those that multiply or read neighbours; `wide` as of stages."""
    layers = report.inspection.layers
    shown = [layer for layer, before in zip(layers, [None, *layers], strict=False) if every or _matters(layer, before)]
    rest = len(layers) - len(shown)
    table = _table("layers", LAYER_COLUMNS, wide=wide)
    table.caption = f"and {rest} norms, activations and sums: layers=all shows them" if rest else None
    for layer in shown:
        _add_row(
            table,
            {
                "layer": layer.name.removeprefix("stages.") or ITSELF,
                "kind": layer.kind,
                "output": "x".join(map(str, layer.shape)),
                "parameters": short(layer.parameters) if layer.parameters else "",
                "MACs": short(layer.macs) if layer.macs else "",
                "activations": in_bytes(layer.activations * report.bytes_per_number),
                "a unit sees": field_of(layer),
                "jump px": both_ways(layer.rows.jump, layer.columns.jump),
                "offset px": both_ways(layer.rows.offset, layer.columns.offset),
            },
        )
    return table


def print_comparison(console: Console, reports: Sequence[Report], *, images_per_second: Sequence[float]) -> None:
    """Networks side by side; speeds are of this machine, in evaluation."""
    table = Table(title="networks side by side", title_justify="left")
    for name, always in COMPARED_COLUMNS.items():
        if always or console.width >= WIDE:  # heads may take two lines, names not
            table.add_column(name, justify="left" if name in WORDS else "right", no_wrap=name == "network")
    for report, speed in zip(reports, images_per_second, strict=True):
        facts, whole = report.facts, report.inspection.first_whole
        _add_row(
            table,
            {
                "network": report.name,
                "image": "x".join(map(str, report.inspection.image)),
                "M parameters": f"{facts['params_millions']:.2f}",
                "GMACs": f"{facts['gmacs']:.3f}",
                "field px": _number(facts.get("receptive_field_px")),
                EFFECTIVE: _number(facts.get("effective_receptive_field_px")),
                "whole image from": whole.place if whole is not None else "",
                "images/s here": f"{speed:,.1f}",
            },
        )
    console.print(table)


def _table(title: str, columns: Mapping[str, bool], *, wide: bool) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for name, always in columns.items():
        if wide or always:
            words = name in WORDS
            table.add_column(name, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    return table


def _add_row(table: Table, cells: Mapping[str, str]) -> None:
    table.add_row(*(cells.get(str(column.header), "") for column in table.columns))


def _matters(layer: Layer, before: Layer | None) -> bool:
    return bool(layer.macs) or before is None or (layer.rows, layer.columns) != (before.rows, before.columns)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
