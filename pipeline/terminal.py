"""A report in the terminal: facts, lifecycle, stages, layers."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from models.inspection import Layer
from models.lifecycle import field_of
from models.report import EFFECTIVE_SHARE, Report
from pipeline.console import print_facts

MIB = 2**20


def print_report(console: Console, report: Report, *, layers: str) -> None:
    """Print all that was found; `layers` is some, those that multiply or read neighbours, all, or none."""
    print_facts(console, facts_of(report))
    for warning in report.warnings:
        console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)
    console.print(lifecycle_table(report))
    footnotes = [moment.footnote for moment in report.moments if moment.footnote]
    for number, footnote in enumerate(footnotes, start=1):
        console.print(f"{number} {footnote}", highlight=False, markup=False)
    console.print(stage_table(report))
    if layers != "none":
        console.print(layer_table(report, every=layers == "all"))


def facts_of(report: Report) -> dict[str, str]:
    """The numbers that stand for a network, by name, for people."""
    found, last, whole = report.inspection, report.inspection.last_window, report.inspection.first_whole
    channels, height, width = found.image
    frozen = f", {found.trainable:,} of them trainable" if found.trainable < found.parameters else ""
    memory = {name: getattr(report.memory, name) / MIB for name in report.memory._fields}
    facts = {
        "model": f"{report.name} for images of {channels}x{height}x{width}",
        "parameters": f"{found.parameters:,}{frozen}",
        "multiply-adds": f"{found.macs / 1e9:.3f} G an image",
    }
    if found.unknown is not None:
        facts["fields"] = found.unknown
    elif last is not None and last.window is not None:
        jump = last.window.jump.rows
        facts["field"] = f"{field_of(last)} at {last.name or last.kind}, {jump:g} px from unit to unit"
        facts["whole image"] = "by its windows alone" if whole is None else f"first in {whole.name} ({whole.kind})"
        misaligned = max(layer.spread for layer in found.layers)
        if misaligned:
            facts["misaligned"] = f"branches that meet have their middles up to {misaligned:g} px apart"
    if report.effective is not None:
        squares = ", ".join(f"{share:.0%} in {side} px" for share, side in report.effective.sides.items())
        facts["effective"] = f"{squares} (squares, gradient energy of {report.effective.num_images} photographs)"
    facts["memory"] = (
        f"{report.memory.total / MIB:,.0f} MiB to train on {report.batch_size} images in {report.precision}: "
        + ", ".join(f"{name} {size:,.0f}" for name, size in memory.items())
    )
    if saving := separable_saving(report):
        facts["separable"] = saving
    if report.comparisons is not None:
        agreeing = sum(comparison.agrees for comparison in report.comparisons)
        facts["check"] = f"{agreeing} of {len(report.comparisons)} fields equal the extent of their gradient"
    return facts


def separable_saving(report: Report) -> str:
    """What depthwise-separable layers cost of the standard convolutions in their place; empty where there are none."""
    ratios = [layer.separable for layer in report.inspection.layers if layer.separable is not None]
    if not ratios:
        return ""
    span = f"{min(ratios):.3f}" + (f" to {max(ratios):.3f}" if max(ratios) > min(ratios) else "")
    return f"{len(ratios)} depthwise layers with their pointwise cost {span} of standard ones: 1/C_out + 1/K^2"


def lifecycle_table(report: Report) -> Table:
    """From pixels to scores."""
    table = Table("stage", "shape", "what it stands for", "a unit sees", title="lifecycle", title_justify="left")
    number = 0
    for moment in report.moments:
        number += bool(moment.footnote)
        shape = ", ".join(["B", *map(str, moment.shape)])
        mark = f" [{number}]" if moment.footnote else ""
        table.add_row(moment.stage, f"({shape})", moment.meaning, moment.field + mark.replace("[", "\\["))
    return table


def stage_table(report: Report) -> Table:
    """A row a stage, and their sum."""
    table = Table(title="stages", title_justify="left")
    table.add_column("stage")
    for name in ("output", "layers", "parameters", "M multiply-adds", "activations MiB", "a unit sees", "jump px"):
        table.add_column(name, justify="right")
    stages = report.stages
    for stage in stages:
        table.add_row(
            stage.name,
            "x".join(map(str, stage.shape)),
            str(stage.layers),
            f"{stage.parameters:,}",
            f"{stage.macs / 1e6:,.1f}",
            f"{stage.activations * report.bytes_per_number / MIB:.2f}",
            stage.field,
            "" if stage.jump is None else f"{stage.jump:g}",
        )
    table.add_section()
    total = report.inspection
    table.add_row(
        "all",
        "",
        str(len(total.layers)),
        f"{sum(stage.parameters for stage in stages):,}",
        f"{total.macs / 1e6:,.1f}",
        f"{total.activations * report.bytes_per_number / MIB:.2f}",
    )
    return table


def layer_table(report: Report, *, every: bool) -> Table:
    """A row a layer; unless `every`, those that multiply or read neighbours."""
    layers = report.inspection.layers
    shown = [layer for layer, before in zip(layers, [None, *layers], strict=False) if every or _matters(layer, before)]
    rest = len(layers) - len(shown)
    caption = f"and {rest} norms, activations and sums: layers=all shows them" if rest else None
    table = Table(title="layers", title_justify="left", caption=caption, caption_justify="left")
    for name in ("layer", "kind"):
        table.add_column(name, overflow="fold")
    for name in ("output", "parameters", "M multiply-adds", "MiB", "a unit sees", "jump px", "offset px"):
        table.add_column(name, justify="right")
    for layer in shown:
        window = layer.window
        table.add_row(
            layer.name,
            layer.kind,
            "x".join(map(str, layer.shape)),
            f"{layer.parameters:,}" if layer.parameters else "",
            f"{layer.macs / 1e6:,.1f}" if layer.macs else "",
            f"{layer.activations * report.bytes_per_number / MIB:.2f}",
            field_of(layer),
            f"{window.jump.rows:g}" if window else "",
            f"{window.offset.rows:g}" if window else "",
        )
    return table


def print_comparison(console: Console, reports: Sequence[Report], *, images_per_second: Sequence[float]) -> None:
    """Networks side by side; speeds are of this machine, in evaluation."""
    table = Table(title="networks side by side", title_justify="left")
    table.add_column("network")
    columns = (
        "image",
        "M parameters",
        "GMACs",
        "field px",
        f"effective px ({EFFECTIVE_SHARE:.0%})",
        "whole image from",
        "images/s here",
    )
    for name in columns:
        table.add_column(name, justify="right")
    for report, speed in zip(reports, images_per_second, strict=True):
        facts, whole = report.facts, report.inspection.first_whole
        table.add_row(
            report.name,
            "x".join(map(str, report.inspection.image)),
            f"{facts['params_millions']:.2f}",
            f"{facts['gmacs']:.3f}",
            _number(facts.get("receptive_field_px")),
            _number(facts.get("effective_receptive_field_px")),
            whole.name if whole is not None else "",
            f"{speed:,.1f}",
        )
    console.print(table)


def _matters(layer: Layer, before: Layer | None) -> bool:
    return bool(layer.macs) or before is None or layer.window != before.window


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
