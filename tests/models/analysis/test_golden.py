"""Whole reports, read by people: what changes is seen in a diff. `pytest --rewrite-golden` writes them anew."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import nn

from models.analysis.cost import training_memory
from models.analysis.report import Report
from models.analysis.stages import field_of
from models.analysis.summary import inspect
from tests.conftest import ROOT
from tests.support.networks import Calls, on_meta
from tests.support.published import PUBLISHED, SMALLEST, Published

GOLDEN = ROOT / "tests" / "golden"
ROWS = [row for row in PUBLISHED if SMALLEST[row.architecture] == row.variant]


def report_on(row: Published) -> Report:
    net, image = on_meta(row), (row.in_channels, row.image_size, row.image_size)
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    memory = training_memory(net, (8, *image), precision="32-true", optimizer=optimizer)
    return Report(row.variant, inspect(net, image), memory, batch_size=8, precision="32-true")


def lines(report: Report) -> Iterator[str]:
    """The report in words, without what a terminal or a page makes of it."""
    yield f"{report.name} for {report.inspection.image}"
    for name, value in report.facts.items():
        yield f"{name} {value:.6g}"
    for name, size in report.memory._asdict().items():
        yield f"{name} {size:,} bytes for a batch of {report.batch_size} in {report.precision}"
    yield "\nlifecycle"
    for moment in report.moments:
        yield f"{moment.stage} | {moment.shape} | {moment.meaning} | {moment.field} | {moment.footnote or ''}".rstrip(
            "| "
        )
    yield "\nstages"
    for stage in report.stages:
        numbers = f"{stage.parameters:,} | {stage.macs:,} | {stage.activations:,}"
        yield f"{stage.name} | {stage.shape} | {numbers} | {stage.field}"
    yield "\nlayers: name | kind | output | parameters | multiply-adds | field | jump | offset | misaligned | separable"
    for layer in report.inspection.layers:
        window = layer.window
        place = f"{window.jump.rows:g} | {window.offset.rows:g}" if window else "- | -"
        cost = f"{layer.separable:.5f}" if layer.separable else "-"
        output = "x".join(map(str, layer.shape))
        numbers = f"{output} | {layer.parameters:,} | {layer.macs:,} | {field_of(layer)} | {place}"
        yield f"{layer.name} | {layer.kind} | {numbers} | {layer.spread:g} | {cost}"


def test_the_table_tells_rows_from_columns() -> None:
    net = Calls(lambda x, conv: conv(x).mean(3), nn.Conv2d(3, 4, (3, 5), stride=(1, 2)))
    memory = training_memory(net, (1, 3, 16, 16), precision="32-true", optimizer=partial(torch.optim.SGD, lr=0.1))
    table = Report("strip", inspect(net, (3, 16, 16)), memory, batch_size=1, precision="32-true").table()
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


def test_every_architecture_has_a_golden_report() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == {row.variant for row in ROWS}
    assert len(ROWS) == 9


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.variant)
def test_reports_are_the_golden_ones(row: Published, request: pytest.FixtureRequest) -> None:
    path, text = GOLDEN / f"{row.variant}.txt", "\n".join(lines(report_on(row))) + "\n"
    if request.config.getoption("--rewrite-golden"):
        path.write_text(text)
    assert text == path.read_text()
