"""What `report` and `train` share: finding out all about a network, and writing it down."""

from __future__ import annotations

import json
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
from models.report import Report
from pipeline.page import render
from pipeline.photographs import as_images, photographs

PAGE, TABLE, PARQUET = "report.html", "layers.json", "layers.parquet"


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
    """The same with its receptive fields compared with the extents of gradients."""
    return replace(report, comparisons=check(net, (BATCH, *report.inspection.image)))


def with_effective_field(
    report: Report, net: nn.Module, *, count: int, folder: Path | None = None, trained: bool = False
) -> tuple[Report, NDArray[np.uint8]]:
    """The same with its effective field over so many photographs, and the first of those, uint8 (H, W, 3).

    Batch norms of a network that is not `trained` are given the statistics of the photographs meanwhile.
    Raises: FileNotFoundError; ValueError for a network whose field cannot be measured.
    """
    channels, height, width = report.inspection.image
    pixels = photographs(folder, count, size=(height, width))
    images = as_images(pixels, channels=channels)
    if trained:
        field = effective_field(net, images)
    else:
        with calibrated(net, images):
            field = effective_field(net, images)
    return replace(report, effective=field, warnings=warnings_about(field, report.inspection)), pixels[0]


def write(report: Report, folder: Path, *, photograph: NDArray[np.uint8] | None = None) -> list[Path]:
    """Write the page, the table of layers as JSON that MLflow shows, and as Parquet; return where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    table = report.table()
    page, as_json, as_parquet = (folder / name for name in (PAGE, TABLE, PARQUET))
    page.write_text(render(report, photograph=photograph), encoding="utf-8")
    rows = [list(row) for row in zip(*table.values(), strict=True)]
    as_json.write_text(json.dumps({"columns": list(table), "data": rows}, indent=None), encoding="utf-8")
    pq.write_table(pa.table(table), as_parquet)
    return [page, as_json, as_parquet]
