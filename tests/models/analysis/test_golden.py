"""Complete reports in plain text, whose changes show in a diff. `pytest --rewrite-golden` rewrites them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import nn

from models.analysis.cost import training_memory
from models.analysis.report import Report
from models.analysis.summary import LayerSummary, summarize
from pipeline.pages.wording import field_words, shape_words, sketch_footnote
from tests.support.networks import Calls, on_meta
from tests.support.paths import ROOT
from tests.support.published import PUBLISHED, SMALLEST, Published

GOLDEN = ROOT / "tests" / "golden"
VARIANTS = SMALLEST | {"convnext": "convnext_tiny", "coatnet": "coatnet_0"}  # those that papers have
ROWS = [row for row in PUBLISHED if VARIANTS[row.architecture] == row.variant]
REWRITE = "type `pytest tests/models/analysis/test_golden.py --rewrite-golden` and read the diff"


def report_of(row: Published) -> Report:
    net, image_shape = on_meta(row), (row.in_channels, row.image_size, row.image_size)
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    memory = training_memory(net, (8, *image_shape), precision="32-true", optimizer=optimizer)
    return Report(row.variant, summarize(net, image_shape), memory, batch_size=8, precision="32-true")


def lines(report: Report) -> Iterator[str]:
    """The report in words, without the layout of a terminal or page."""
    yield f"{report.name} for {report.summary.image_shape}"
    for name, value in report.facts.items():
        yield f"{name} {value:.6g}"
    for name, size in report.memory._asdict().items():
        yield f"{name} {size:,} bytes for a batch of {report.batch_size} in {report.precision}"
    yield "\nlifecycle"
    for stage in report.lifecycle:
        field = field_words(stage.rows, stage.columns)
        footnote = [sketch_footnote(stage.sketch)] if stage.sketch else []
        yield " | ".join([stage.name, str(stage.shape), stage.meaning, field, *footnote])
    yield "\nstages"
    for total in report.stages:
        numbers = f"{total.num_parameters:,} | {total.macs:,} | {total.num_activations:,}"
        yield f"{total.name} | {total.shape} | {numbers} | {field_words(total.rows, total.columns)}"
    yield "\nlayers: name | kind | output | parameters | MACs | field | stride | offset | misaligned | separable"
    yield from map(layer_line, report.summary.layers)


def layer_line(layer: LayerSummary) -> str:
    place = f"{layer.rows.stride:g} | {layer.rows.offset:g}" if layer.local_size else "- | -"
    cost = f"{layer.separable_cost:.5f}" if layer.separable_cost else "-"
    counts = f"{shape_words(layer.shape)} | {layer.num_parameters:,} | {layer.macs:,}"
    field = field_words(layer.rows, layer.columns)
    return f"{layer.name} | {layer.kind} | {counts} | {field} | {place} | {layer.misalignment:g} | {cost}"


def test_the_layer_table_separates_rows_and_columns() -> None:
    net = Calls(lambda x, conv: conv(x).mean(3), nn.Conv2d(3, 4, (3, 5), stride=(1, 2)))
    memory = training_memory(net, (1, 3, 16, 16), precision="32-true", optimizer=partial(torch.optim.SGD, lr=0.1))
    table = Report("strip", summarize(net, (3, 16, 16)), memory, batch_size=1, precision="32-true").layer_table()
    assert {name: cells for name, cells in table.items() if name.endswith(("rows", "columns"))} == {
        "receptive_field_rows": [3, 3],
        "receptive_field_columns": [5, None],
        "jump_rows": [1.0, 1.0],
        "jump_columns": [2.0, None],
        "offset_rows": [0, 0],
        "offset_columns": [0, None],
        "all_rows": [False, False],
        "all_columns": [False, True],
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.variant)
def test_reports_equal_the_golden_ones(row: Published, request: pytest.FixtureRequest) -> None:
    path, text = GOLDEN / f"{row.variant}.txt", "\n".join(lines(report_of(row))) + "\n"
    if request.config.getoption("--rewrite-golden"):
        path.write_text(text)
    assert path.exists(), f"no golden report {path}: {REWRITE}"
    assert text == path.read_text(), f"the report of {row.variant} changed; if that is intended, {REWRITE}"


def test_every_architecture_has_a_golden_report() -> None:
    architectures = {path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")}
    assert architectures == {row.architecture for row in ROWS}, "give each a row in tests/support/published.py"
    written, expected = {path.stem for path in GOLDEN.glob("*.txt")}, {row.variant for row in ROWS}
    assert written >= expected, f"no golden report of {expected - written}: {REWRITE}"
    assert written <= expected, f"delete the golden reports of {written - expected}, which no row names"
