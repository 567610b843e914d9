"""Measure a network and write the results: what `report` and every training share."""

import io
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from data.shards.dataset import write_atomically
from models.analysis.cost import training_memory
from models.analysis.effective_field import effective_field, field_warnings
from models.analysis.fresh_norms import estimated_norms, is_fresh
from models.analysis.gradient_extent import compare_with_gradient
from models.analysis.intervals import UnknownReceptiveField
from models.analysis.report import FACTS, LAYER_COLUMNS, Report
from models.analysis.summary import BATCH, summarize
from models.learning.recipe import OptimizerFactory
from pipeline.pages.report_page import render_comparison, render_report
from pipeline.report.sample_images import SampleImages, to_network_input

ACTIVATION_BUDGET = 2**30  # bytes for the effective field, unless a single image needs more
ARROW_TYPES = {int: pa.int64(), float: pa.float64(), str: pa.string(), bool: pa.bool_(), list: pa.list_(pa.int64())}
LAYER_TABLE = "layers.json"
SPEED_ROUNDS = 3


@dataclass(frozen=True)
class TrainingSettings:
    """How a network is trained, as far as its memory depends on it."""

    batch_size: int
    precision: str
    optimizer: OptimizerFactory


def measure_network(
    net: nn.Module, name: str, *, image_shape: tuple[int, int, int], training: TrainingSettings
) -> Report:
    """Report what shapes (C, H, W) alone decide; the network may be on the meta device. Raises: ValueError."""
    batch_size, precision, summary = training.batch_size, training.precision, summarize(net, image_shape)
    if not summary.layers:
        raise ValueError(f"{name} applies no operation to its images")
    memory = training_memory(net, (batch_size, *image_shape), precision=precision, optimizer=training.optimizer)
    return Report(name, summary, memory, batch_size=batch_size, precision=precision)


def check_with_gradient(report: Report, net: nn.Module) -> Report:
    """Add the comparison of receptive fields with gradients, or a warning why there is none."""
    reason = report.summary.unknown or "no unit has a local receptive field"
    if report.summary.last_local_layer is not None:
        try:
            return replace(report, comparisons=compare_with_gradient(net, (BATCH, *report.summary.image_shape)))
        except UnknownReceptiveField as error:
            reason = str(error)
    return replace(report, warnings=[*report.warnings, f"not checked: {reason}"])


def measure_effective_field(report: Report, net: nn.Module, *, samples: SampleImages, weights: str | None) -> Report:
    """Add the effective field over sample images, or a warning why it was not measured.

    `weights` describes what was loaded, None for nothing: a fresh network is measured with the batch statistics of the
    samples and with its zero-initialised scales at 1. A network without local receptive fields is returned unchanged.
    """
    if report.summary.last_local_layer is None:
        return report
    images = to_network_input(samples.pixels, channels=report.summary.image_shape[0])
    images_at_once = max(1, ACTIVATION_BUDGET // max(1, report.memory.activations // report.batch_size))
    try:
        fresh = weights is None and is_fresh(net)
        with estimated_norms(net, images) if fresh else nullcontext():
            field = effective_field(net, images, images_at_once=images_at_once)
    except ValueError as error:
        return replace(report, warnings=[*report.warnings, f"effective field not measured: {error}"])
    warnings = [*report.warnings, *field_warnings(field, report.summary)]
    weights = weights or ("newly initialised weights" if fresh else "the weights it is built with")
    measured_with, image = f"{weights}, over {samples.description}", samples.pixels[0]
    return replace(report, effective=field, measured_with=measured_with, sample_image=image, warnings=warnings)


@torch.inference_mode()
def measure_speed(nets: Sequence[nn.Module], shapes: Sequence[tuple[int, int, int]], *, batch_size: int) -> list[float]:
    """Return images per second of each network in evaluation, on batches of its shape (C, H, W), in float32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = []
    for net, shape in zip(nets, shapes, strict=True):
        net.eval().to(device).to(memory_format=torch.channels_last)
        batches.append(torch.randn(batch_size, *shape, device=device).to(memory_format=torch.channels_last))
    for net, images in zip(nets, batches, strict=True):
        _seconds(net, images)
    # The networks alternate, so that other load on the machine affects all of them alike.
    rounds = [[_seconds(net, images) for net, images in zip(nets, batches, strict=True)] for _ in range(SPEED_ROUNDS)]
    return [batch_size / statistics.median(seconds) for seconds in zip(*rounds, strict=True)]


def writable_folder(folder: Path) -> Path:
    """Return the folder, which need not exist. Raises: ValueError when it cannot be written to."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"out={folder} is not a writable folder: see {existing}")
    return folder


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write the page, the layers as JSON and Parquet, and last the numbers as JSON; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    page, numbers = folder / "report.html", folder / "report.json"
    write_atomically(page, render_report(report).encode())
    tables = _write_table(report.layer_table(), folder / LAYER_TABLE, types=LAYER_COLUMNS)
    write_atomically(numbers, json.dumps(report.to_dict(), indent=1).encode())
    return [page, numbers, *tables]


def write_comparison(reports: Sequence[Report], folder: Path, *, images_per_second: Sequence[float]) -> list[Path]:
    """Write the page of a comparison and its table as JSON and Parquet; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "comparison.html"
    write_atomically(page, render_comparison(reports, images_per_second=images_per_second).encode())
    local = [report.summary.last_local_layer for report in reports]
    global_layers = [report.summary.first_global_layer for report in reports]
    table: dict[str, Sequence[object]] = {
        "network": [report.name for report in reports],
        **{fact: [report.facts.get(fact) for report in reports] for fact in FACTS},
        "receptive_field_rows": [layer and layer.rows.size for layer in local],
        "receptive_field_columns": [layer and layer.columns.size for layer in local],
        "whole_image_from": [layer and layer.location for layer in global_layers],
        "image": [list(report.summary.image_shape) for report in reports],
        "training_memory_mib": [report.memory.total / 2**20 for report in reports],
        "images_per_second": images_per_second,
    }
    fields = {"receptive_field_rows": int, "receptive_field_columns": int, "image": list}
    types = dict.fromkeys(table, float) | {"network": str, "whole_image_from": str, **fields}
    return [page, *_write_table(table, folder / "comparison.json", types=types)]


def _write_table(table: Mapping[str, Sequence[object]], path: Path, *, types: Mapping[str, type]) -> list[Path]:
    """Write a table by column as Parquet, and then as JSON beside it, in pandas' split layout."""
    parquet, content = path.with_suffix(".parquet"), io.BytesIO()
    schema = pa.schema([(name, ARROW_TYPES[kind]) for name, kind in types.items()])
    pq.write_table(pa.table(dict(table), schema=schema), content)
    write_atomically(parquet, content.getvalue())
    rows = [list(row) for row in zip(*table.values(), strict=True)]
    write_atomically(path, json.dumps({"columns": list(table), "data": rows}).encode())
    return [path, parquet]


def _seconds(net: nn.Module, images: Tensor) -> float:
    began = time.perf_counter()
    net(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
