"""A report in the terminal: facts, and tables of the lifecycle, the stages and the layers."""

from collections.abc import Collection, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from models.analysis.gradient_extent import FieldComparison
from models.analysis.report import EFFECTIVE_SHARE, Report, StageTotals
from models.analysis.summary import LayerSummary
from models.analysis.trace import NETWORK_ITSELF
from pipeline.cli.console import print_facts, print_line
from pipeline.pages import wording

WIDE = 120  # columns of a terminal with room for all columns of a table
TEXTS = ("stage", "shape", "features (rule of thumb)", "receptive field", "layer", "kind", "network", "global from")


def print_report(console: Console, report: Report, *, layers: str) -> None:
    """Print a report; `layers` is all, some (those that multiply or change the receptive field) or none."""
    print_facts(console, _facts(report))
    lines = [_difference(one) for one in report.comparisons or [] if not one.agrees]
    for line in [*lines, *(f"warning: {warning}" for warning in report.warnings)]:
        print_line(console, line)
    _print_lifecycle(console, report)
    _print_stages(console, report)
    if layers != "none":
        _print_layers(console, report, every=layers == "all")


def print_comparison(console: Console, reports: Sequence[Report], *, images_per_second: Sequence[float]) -> None:
    """Print networks side by side, with their speed in evaluation on this machine."""
    rows = [
        {
            "network": report.name,
            "image": wording.shape_words(report.summary.image_shape),
            "M params": wording.fixed(report.facts["params_millions"], 2),
            "GMACs": wording.fixed(report.facts["gmacs"], 3),
            "field px": wording.integer(report.facts.get("receptive_field_px")),
            "effective px": wording.integer(report.facts.get("effective_receptive_field_px")),
            "global from": layer.location if (layer := report.summary.first_global_layer) else "",
            "images/s": wording.rate(speed),
        }
        for report, speed in zip(reports, images_per_second, strict=True)
    ]
    effective = f"side of the square with {wording.share(EFFECTIVE_SHARE, digits=0)} of the energy"
    caption = f"effective: {effective}; images/s: on this machine"
    _print_table(console, "networks side by side", rows=rows, details=("image", "global from"), caption=caption)


def _facts(report: Report) -> dict[str, str]:
    summary, memory = report.summary, report.memory
    is_frozen = summary.num_trainable < summary.num_parameters
    frozen = f", {wording.integer(summary.num_trainable)} of them trainable" if is_frozen else ""
    facts = {
        "model": f"{report.name} for images of {wording.shape_words(summary.image_shape)}",
        "parameters": f"{wording.integer(summary.num_parameters)}{frozen}",
        "multiply-adds": f"{wording.short_count(summary.macs)} an image",
        **_field_facts(report),
    }
    if report.effective is not None:
        sides = report.effective.sides.items()
        squares = ", ".join(f"{wording.share(part, digits=0)} in {side} px" for part, side in sides)
        facts["effective"] = f"squares with a share of the gradient's energy: {squares}"
        facts["measured"] = f"with {report.measured_with}"
    parts = ", ".join(f"{name} {wording.byte_count(size)}" for name, size in memory._asdict().items())
    batch = f"batches of {wording.integer(report.batch_size)} in {report.precision}"
    facts["memory"] = f"{wording.byte_count(memory.total)} to train on {batch}: {parts}"
    ratios = [layer.separable_cost for layer in summary.layers if layer.separable_cost is not None]
    if ratios:
        span = " to ".join(dict.fromkeys(wording.fixed(ratio, 3) for ratio in (min(ratios), max(ratios))))
        facts["separable"] = f"{len(ratios)} depthwise-separable layers cost {span} of standard ones: 1/C_out + 1/K^2"
    if report.comparisons is not None:
        facts["check"] = _check_words(report.comparisons)
    return facts


def _field_facts(report: Report) -> dict[str, str]:
    summary = report.summary
    last, first_global = summary.last_local_layer, summary.first_global_layer
    if summary.unknown is not None:
        return {"field": summary.unknown}
    facts = {"field": "no unit has a local field along both axes", "global field": "in no layer"}
    if last is not None:
        jump = wording.pair_words(last.rows.stride, last.columns.stride)
        field = wording.field_words(last.rows, last.columns)
        facts["field"] = f"{field} at {last.location}, {jump} px between neighbouring units"
    if first_global is not None:
        facts["global field"] = f"first in {first_global.location} ({first_global.kind})"
    misaligned = max(layer.misalignment for layer in summary.layers)
    if misaligned:
        facts["misaligned"] = (
            f"branches meet with the centers of their fields up to {wording.significant(misaligned)} px apart"
        )
    return facts


def _check_words(comparisons: Sequence[FieldComparison]) -> str:
    inside = [one.agrees for one in comparisons if one.is_inside]
    cut = [one.agrees for one in comparisons if not one.is_inside]
    words = f"{sum(inside)} of {len(inside)} fields equal the extent of their gradient, at the end of each resolution"
    return words + (f"; {sum(cut)} of {len(cut)} contain it, cut by the border of the image" if cut else "")


def _difference(one: FieldComparison) -> str:
    rules, gradient = wording.interval_words(one.propagated), wording.interval_words(one.gradient)
    return f"differs: {one.layer} along {one.axis}: pixels {rules} by rules, {gradient} by gradient"


def _print_lifecycle(console: Console, report: Report) -> None:
    sketches = [stage.sketch for stage in report.lifecycle if stage.sketch]
    rows = [
        {
            "stage": stage.name,
            "shape": f"({', '.join(['B', *map(str, stage.shape)])})",
            "features (rule of thumb)": stage.meaning,
            "receptive field": wording.field_words(stage.rows, stage.columns)
            + (f" [{sketches.index(stage.sketch) + 1}]" if stage.sketch else ""),
        }
        for stage in report.lifecycle
    ]
    _print_table(console, "lifecycle", rows=rows)
    for number, sketch in enumerate(sketches, start=1):
        print_line(console, f"{number} {wording.sketch_footnote(sketch)}")


def _print_stages(console: Console, report: Report) -> None:
    summary, num_bytes = report.summary, report.bytes_per_activation
    rows = []
    for stage in report.stages:
        rows.append({"stage": stage.name, "layers": str(stage.num_layers), **_cells(stage, num_bytes=num_bytes)})
    if summary.num_unused:
        rows.append({"stage": "not in evaluation", "parameters": wording.short_count(summary.num_unused)})
    total = {
        "stage": "total",
        "layers": str(len(summary.layers)),
        "parameters": wording.short_count(summary.num_parameters),
        "MACs": wording.short_count(summary.macs),
        "activations": wording.byte_count(summary.num_activations * num_bytes),
    }
    details, caption = ("layers", "activations", "jump px"), "jump: distance between neighbouring receptive fields"
    _print_table(console, "stages", rows=rows, details=details, total=total, caption=caption)


def _print_layers(console: Console, report: Report, *, every: bool) -> None:
    layers, num_bytes = report.summary.layers, report.bytes_per_activation
    pairs = zip(layers, [None, *layers], strict=False)
    shown = [layer for layer, before in pairs if every or _matters(layer, before)]
    rows = []
    for layer in shown:
        name, offset = layer.name.removeprefix("stages."), wording.pair_words(layer.rows.offset, layer.columns.offset)
        cells = _cells(layer, num_bytes=num_bytes)
        rows.append({"layer": name or NETWORK_ITSELF, "kind": layer.kind, **cells, "offset px": offset})
    caption = "offset: first pixel of the first unit's receptive field, negative in the padding"
    _print_table(console, "layers", rows=rows, details=("MACs", "activations", "jump px", "offset px"), caption=caption)
    if len(shown) < len(layers):
        console.print(f"{len(layers) - len(shown)} norms, activations and sums are left out: layers=all shows them")


def _matters(layer: LayerSummary, before: LayerSummary | None) -> bool:
    return bool(layer.macs) or before is None or (layer.rows, layer.columns) != (before.rows, before.columns)


def _cells(part: StageTotals | LayerSummary, *, num_bytes: int) -> dict[str, str]:
    return {
        "output": wording.shape_words(part.shape),
        "parameters": wording.short_count(part.num_parameters) if part.num_parameters else "",
        "MACs": wording.short_count(part.macs) if part.macs else "",
        "activations": wording.byte_count(part.num_activations * num_bytes),
        "receptive field": wording.field_words(part.rows, part.columns),
        "jump px": wording.pair_words(part.rows.stride, part.columns.stride),
    }


def _print_table(
    console: Console,
    title: str,
    *,
    rows: Sequence[Mapping[str, str]],
    details: Collection[str] = (),
    total: Mapping[str, str] | None = None,
    caption: str | None = None,
) -> None:
    """Print rows under the columns of the first; `details` are columns, with a caption, for wide terminals only."""
    is_wide, totals = console.width >= WIDE, total or {}
    table = Table(title=title, title_justify="left", caption_justify="left", show_footer=bool(totals))
    table.caption = caption if is_wide else None
    columns = [column for column in rows[0] if is_wide or column not in details]
    for name in columns:
        text, footer = name in TEXTS, totals.get(name, "")
        table.add_column(name, footer, justify="left" if text else "right", no_wrap=not text, overflow="fold")
    for row in rows:
        table.add_row(*(escape(row.get(name, "")) for name in columns))
    console.print(table)
