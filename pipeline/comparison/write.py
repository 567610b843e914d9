"""The files of a comparison: a page, a Parquet table with a row for each run, JSON for programs."""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data.shards.dataset import write_atomically
from pipeline.comparison.runs import ComparedRun, Neighbours, find_pareto_front
from pipeline.pages.runs_page import Front, render_runs

PAGE, TABLE, NUMBERS = "index.html", "comparison.parquet", "comparison.json"
COSTS = {"parameters": "parameters, M", "gmacs": "multiply-adds, G", "images_per_second": "training, ms an image"}
TYPES = {
    **dict.fromkeys(
        ("name", "folder", "network", "dataset", "training_images", "top1_images", "image_size"), pa.string()
    ),
    **dict.fromkeys(("images", "parameters", "epochs"), pa.int64()),
}


def write_comparison(
    runs: Sequence[ComparedRun], pairs: Sequence[Neighbours], *, split: str | None, folder: Path
) -> list[Path]:
    """Write all files, the JSON last, and return their paths. Raises: OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in (PAGE, TABLE, NUMBERS)]
    fronts = build_fronts(runs)
    rows = [run.to_dict() for run in runs]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    schema = pa.schema([(name, TYPES.get(name, pa.float64())) for name in columns])
    content = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), content)
    differences = [asdict(pair) for pair in pairs]
    numbers = {
        "split": split,
        "runs": rows,
        "neighbours": differences,
        "pareto": {name: list(front.best) for name, front in fronts.items()},
    }
    write_atomically(files[0], render_runs(rows, differences, fronts=fronts, split=split).encode())
    write_atomically(files[1], content.getvalue())
    write_atomically(files[2], json.dumps(numbers, indent=1, ensure_ascii=False).encode() + b"\n")
    return files


def build_fronts(runs: Sequence[ComparedRun]) -> dict[str, Front]:
    """Return top-1 against each cost: the cost of every run, and the runs that none beats in both."""
    found = {}
    for name, title in COSTS.items():
        costs = [_cost(run, name) for run in runs]
        found[name] = Front(title, costs, find_pareto_front(runs, costs))
    return found


def _cost(run: ComparedRun, name: str) -> float | None:
    if name == "parameters":
        return run.parameters / 1e6
    if name == "gmacs":
        return run.gmacs
    return 1e3 / run.images_per_second if run.images_per_second else None
