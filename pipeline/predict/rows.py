"""Predictions as rows of CSV, JSON lines or Parquet."""

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cli.errors import ConfigError
from pipeline.runs.trained import Prediction

SUFFIXES = (".csv", ".jsonl", ".parquet")
ROWS_AT_ONCE = 10_000  # of a Parquet file's row group
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("class", pa.string()),
        ("probability", pa.float32()),
        ("unsure", pa.bool_()),
        ("error", pa.string()),
        ("top_classes", pa.list_(pa.string())),
        ("top_probabilities", pa.list_(pa.float32())),
    ]
)
Write = Callable[[Prediction], None]


def check_output(out: Path | None, *, source: Path) -> None:
    """Raise ConfigError for a suffix that names no format, a folder that does not exist, or the file that is read."""
    if out is None:
        return
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"out={out} must end in {', '.join(SUFFIXES)}")
    if not out.parent.is_dir():
        raise ConfigError(f"out={out}: there is no folder {out.parent}")
    if out.is_dir():
        raise ConfigError(f"out={out} is a folder: give a file")
    if out.exists() and source.exists() and out.samefile(source):
        raise ConfigError(f"out={out} is the input: give another file")


@contextmanager
def row_writer(out: Path | None, *, top: int) -> Iterator[Write]:
    """Yield a function that writes a prediction with its `top` classes; None writes CSV to standard output.

    A file appears at the end, complete; after an error there is none, and an earlier one stays.
    """
    if out is None:
        yield _csv_writer(sys.stdout, top=top)
    else:
        partial = out.with_name(f".{out.name}.{os.getpid()}")
        try:
            is_table = out.suffix == ".parquet"
            opened = _parquet_writer(partial, top=top) if is_table else _text_writer(partial, out.suffix, top=top)
            with opened as write:
                yield write
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _parquet_writer(path: Path, *, top: int) -> Iterator[Write]:
    with pq.ParquetWriter(path, SCHEMA) as writer:
        rows: list[dict[str, object]] = []

        def write(prediction: Prediction) -> None:
            rows.append(_row(prediction, top=top))
            if len(rows) == ROWS_AT_ONCE:
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
                rows.clear()

        yield write
        writer.write_table(pa.Table.from_pylist(rows, SCHEMA))


@contextmanager
def _text_writer(path: Path, suffix: str, *, top: int) -> Iterator[Write]:
    with path.open("w", encoding="utf-8", newline="") as file:
        yield _csv_writer(file, top=top) if suffix == ".csv" else _json_writer(file, top=top)


def _csv_writer(file: TextIO, *, top: int) -> Write:
    writer = csv.writer(file, lineterminator="\n")
    further = [f"{name}_{number}" for number in range(2, top + 1) for name in ("class", "probability")]
    writer.writerow(["path", "class", "probability", "unsure", "error", *further])

    def write(prediction: Prediction) -> None:
        cells = [cell for name, value in prediction.top(top) for cell in (name, f"{value:.6f}")]
        cells += [""] * (2 * top - len(cells))
        unsure = "unsure" if prediction.is_unsure else ""
        writer.writerow([prediction.name, *cells[:2], unsure, prediction.error or "", *cells[2:]])

    return write


def _json_writer(file: TextIO, *, top: int) -> Write:
    def write(prediction: Prediction) -> None:
        file.write(json.dumps(_row(prediction, top=top), ensure_ascii=False) + "\n")

    return write


def _row(prediction: Prediction, *, top: int) -> dict[str, object]:
    best = prediction.top(top)
    return {
        "path": prediction.name,
        "class": best[0][0] if best else None,
        "probability": best[0][1] if best else None,
        "unsure": prediction.is_unsure,
        "error": prediction.error,
        "top_classes": [name for name, _ in best],
        "top_probabilities": [value for _, value in best],
    }
