"""What `report` and `train` share: finding out all about a network, and writing it down."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch import nn

from models.analysis.axes import UnknownReceptiveField
from models.analysis.cost import MakeOptimizer, training_memory
from models.analysis.effective_field import effective_field, warnings_about
from models.analysis.fresh_norms import calibrated, is_fresh
from models.analysis.gradient_extent import check
from models.analysis.report import COLUMNS, FACTS, Report
from models.analysis.stages import field_of
from models.analysis.summary import BATCH, inspect
from pipeline.pages.page import render, render_comparison
from pipeline.report.sample_images import Photographs, as_images

AT_ONCE = 2**30  # bytes of activations that the effective field is measured with, unless one image needs more
ARROW = {int: pa.int64(), float: pa.float64(), str: pa.string(), bool: pa.bool_()}
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
    shape, inspection = (training.batch_size, *image), inspect(net, image)
    if not inspection.layers:
        raise ValueError(f"{name} does nothing to images")
    return Report(
        name=name,
        inspection=inspection,
        memory=training_memory(net, shape, precision=training.precision, optimizer=training.optimizer),
        batch_size=training.batch_size,
        precision=training.precision,
    )


def with_check(report: Report, net: nn.Module) -> Report:
    """The same with its receptive fields compared with the extents of gradients, or a warning why they are not."""
    if report.inspection.last_window is None:
        why = report.inspection.unknown or "no unit is reached through windows alone"
        return replace(report, warnings=[*report.warnings, f"not checked: {why}"])
    try:
        return replace(report, comparisons=check(net, (BATCH, *report.inspection.image)))
    except UnknownReceptiveField as error:
        return replace(report, warnings=[*report.warnings, f"not checked: {error}"])


def with_effective_field(report: Report, net: nn.Module, *, shown: Photographs, weights: str | None) -> Report:
    """The same with its effective field over photographs of the size of its images.

    `weights` says in words what the network was given, None that nothing: then, if it is fresh, its norms have the
    statistics of the photographs, and its blocks are open, meanwhile. One without units that windows reach is reported
    as it was, and one whose field cannot be measured with a warning why.
    """
    if report.inspection.last_window is None:
        return report
    images = as_images(shown.pixels, channels=report.inspection.image[0])
    at_once = max(1, AT_ONCE // max(1, report.memory.activations // report.batch_size))
    try:
        fresh = weights is None and is_fresh(net)
        with calibrated(net, images) if fresh else nullcontext():
            field = effective_field(net, images, images_at_once=at_once)
    except ValueError as error:
        return replace(report, warnings=[*report.warnings, f"effective field not measured: {error}"])
    warnings = [*report.warnings, *warnings_about(field, report.inspection)]
    weights = weights or ("fresh weights" if fresh else "the weights that it is built with")
    measured = f"{weights}, over {shown.said}"
    return replace(report, effective=field, measured=measured, warnings=warnings)


def check_folder(folder: Path) -> Path:
    """The folder, which need not be there yet. Raises: ValueError where it could not be written to."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"out={folder} is no folder to write to: see {there}")
    return folder


def write(report: Report, folder: Path, *, photograph: NDArray[np.uint8] | None = None) -> list[Path]:
    """Write the page, its numbers as JSON, the table of layers as JSON and Parquet; return where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    page, numbers = folder / PAGE, folder / NUMBERS
    page.write_text(render(report, photograph=photograph), encoding="utf-8")
    numbers.write_text(json.dumps(report.numbers(), indent=1), encoding="utf-8")
    return [page, numbers, *_write_table(report.table(), folder / TABLE, kinds=COLUMNS)]


def write_comparison(reports: Sequence[Report], folder: Path, *, images_per_second: Sequence[float]) -> list[Path]:
    """Write the page of a comparison, and its table as JSON and Parquet; return where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "comparison.html"
    page.write_text(render_comparison(reports, images_per_second=images_per_second), encoding="utf-8")
    facts: dict[str, list[object]] = {fact: [report.facts.get(fact) for report in reports] for fact in FACTS}
    names = [report.name for report in reports]
    fields: list[object] = [last and field_of(last) for last in (report.inspection.last_window for report in reports)]
    table: dict[str, list[object]] = {"network": [*names], **facts, "field": fields}
    first = [report.inspection.first_whole for report in reports]
    table["whole_image_from"] = [layer and layer.place for layer in first]
    table["image"] = ["x".join(map(str, report.inspection.image)) for report in reports]
    table["training_memory_mib"] = [report.memory.total / 2**20 for report in reports]
    table["images_per_second"] = [*images_per_second]
    words = ("network", "field", "whole_image_from", "image")
    kinds = {name: str if name in words else float for name in table}
    return [page, *_write_table(table, folder / "comparison.json", kinds=kinds)]


def _write_table(table: Mapping[str, Sequence[object]], as_json: Path, *, kinds: Mapping[str, type]) -> list[Path]:
    """A table by column as JSON, columns and rows as pandas splits them, and as Parquet of these kinds beside it."""
    rows = [list(row) for row in zip(*table.values(), strict=True)]
    as_json.write_text(json.dumps({"columns": list(table), "data": rows}), encoding="utf-8")
    as_parquet = as_json.with_suffix(".parquet")
    schema = pa.schema([(name, ARROW[kind]) for name, kind in kinds.items()])
    pq.write_table(pa.table(dict(table), schema=schema), as_parquet)
    return [as_json, as_parquet]
