"""What `report` and `train` share: finding out all about a network, and writing it down."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch import nn

from models.complexity import MakeOptimizer, training_memory
from models.effective_field import calibrated, effective_field, warnings_about
from models.gradient_extent import check
from models.inspection import BATCH, inspect
from models.report import FACTS, Report
from models.sights import UnknownReceptiveField
from pipeline.page import render, render_comparison
from pipeline.photographs import as_images, photographs

AT_ONCE = 2**30  # bytes of activations that the effective field is measured with, unless one image needs more
PAGE, NUMBERS, TABLE = "report.html", "report.json", "layers.json"


@dataclass(frozen=True)
class Training:
    """How a network is to be trained, as far as memory depends on it."""

    batch_size: int
    precision: str
    optimizer: MakeOptimizer


def report_on(net: nn.Module, name: str, *, image: tuple[int, int, int], training: Training) -> Report:
    """What shapes alone tell of a network for images (C, H, W); it may be on the meta device.

    Raises: ValueError for a network that does not take such images, or a precision that is not known.
    """
    shape = (training.batch_size, *image)
    return Report(
        name=name,
        inspection=inspect(net, image),
        memory=training_memory(net, shape, precision=training.precision, optimizer=training.optimizer),
        batch_size=training.batch_size,
        precision=training.precision,
    )


def with_check(report: Report, net: nn.Module) -> Report:
    """The same with its receptive fields compared with the extents of gradients, or a warning why they are not."""
    if report.inspection.last_window is None:
        return report
    try:
        return replace(report, comparisons=check(net, (BATCH, *report.inspection.image)))
    except UnknownReceptiveField as error:
        return replace(report, warnings=[*report.warnings, f"not checked: {error}"])


def with_effective_field(
    report: Report, net: nn.Module, *, count: int, folder: Path | None = None, trained: bool = False
) -> tuple[Report, NDArray[np.uint8] | None]:
    """The same with its effective field over so many photographs, and the first of those, uint8 (H, W, 3).

    Batch norms of a network that is not `trained` are given the statistics of the photographs meanwhile. A network in
    which no unit is reached through windows alone is reported as it was, with None.
    Raises: FileNotFoundError; ValueError for a network whose field cannot be measured.
    """
    if report.inspection.last_window is None:
        return report, None
    channels, height, width = report.inspection.image
    pixels = photographs(folder, count, size=(height, width))
    images = as_images(pixels, channels=channels)
    at_once = max(1, min(count, AT_ONCE // max(1, report.memory.activations // report.batch_size)))
    with nullcontext() if trained else calibrated(net, images):
        field = effective_field(net, images, images_at_once=at_once)
    warnings = [*report.warnings, *warnings_about(field, report.inspection)]
    return replace(report, effective=field, warnings=warnings), pixels[0]


def write(report: Report, folder: Path, *, photograph: NDArray[np.uint8] | None = None) -> list[Path]:
    """Write the page, its numbers as JSON, the table of layers as JSON and Parquet; return where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    page, numbers = folder / PAGE, folder / NUMBERS
    page.write_text(render(report, photograph=photograph), encoding="utf-8")
    numbers.write_text(json.dumps(report.numbers(), indent=1), encoding="utf-8")
    return [page, numbers, *_write_table(report.table(), folder / TABLE)]


def write_comparison(reports: Sequence[Report], folder: Path, *, images_per_second: Sequence[float]) -> list[Path]:
    """Write the page of a comparison, and its table as JSON and Parquet; return where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "comparison.html"
    page.write_text(render_comparison(reports, images_per_second=images_per_second), encoding="utf-8")
    facts: dict[str, list[object]] = {fact: [report.facts.get(fact) for report in reports] for fact in FACTS}
    names = [report.name for report in reports]
    table: dict[str, list[object]] = {"network": [*names], **facts, "images_per_second": [*images_per_second]}
    return [page, *_write_table(table, folder / "comparison.json")]


def _write_table(table: Mapping[str, Sequence[object]], as_json: Path) -> list[Path]:
    """A table by column as JSON, columns and rows as pandas splits them, and as Parquet beside it."""
    rows = [list(row) for row in zip(*table.values(), strict=True)]
    as_json.write_text(json.dumps({"columns": list(table), "data": rows}), encoding="utf-8")
    as_parquet = as_json.with_suffix(".parquet")
    pq.write_table(pa.table(dict(table)), as_parquet)
    return [as_json, as_parquet]
