"""Time and memory of each stage from a folder of images to the rows of a batch, at two sizes and one that is made up.

    python -m benchmarks.scale --folder DIR      100,000 and 1,000,000 images of 32x32 pixels (6 GB in DIR), 12 minutes

Each stage runs in a separate process, with workers for each core. Memory is the peak of that process, above one that
has only imported the same modules; a worker holds one tar's rows. The last rows open an index of 100 million rows in
100,000 tars that were never written.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.loading.order import TrainingPlan
from data.shards import sources
from data.shards.dataset import SCHEMA, Index, Shard, Split
from data.shards.images import to_jpeg
from data.shards.index_writer import GROUP_ROWS
from data.shards.indexing import index_part, open_dataset
from data.shards.pack import merge_parts, pack_part
from data.shards.parallel import Part

CLASSES, ORIGINALS = 1000, 1000
SHARD_SAMPLES = 1000
LARGE = 100_000_000


def make_images(folder: Path, count: int) -> None:
    """Make class folders of links to ORIGINALS different images."""
    from PIL import Image

    originals = folder / "originals"
    originals.mkdir(parents=True)
    for number in range(ORIGINALS):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        image = Image.fromarray(pixels).resize((32, 32))
        (originals / f"{number}.jpg").write_bytes(to_jpeg(image, quality=90))
    for label in range(CLASSES):
        (folder / "images" / f"n{label:08d}").mkdir(parents=True)
        for number in range(count // CLASSES):
            name = folder / "images" / f"n{label:08d}" / f"n{label:08d}_{number}.jpg"
            os.link(originals / f"{(label + number) % ORIGINALS}.jpg", name)


def list_source(folder: Path) -> sources.Source:
    """List the images, as every part does."""
    return sources.folder(folder / "images", "images", val_fraction=0.01, seed=0)


def pack_all(folder: Path) -> None:
    """List the images and write all tars, but neither index nor manifest."""
    pack_part(list_source(folder), folder / "packed", part=Part(1, 1))


def merge(folder: Path) -> None:
    """List the images, then write index and manifest."""
    merge_parts(list_source(folder), folder / "packed")


def read_tars(folder: Path) -> None:
    """Read all tars as those of others: hash them, decode each image."""
    index_part(folder / "packed", folder / "index", part=Part(1, 1))


def merge_index(folder: Path) -> None:
    """Write the index of tars that have been read."""
    open_dataset(folder / "packed", folder / "index")


def open_index(folder: Path) -> None:
    """Open the data set, as a training does: list the tars, hash the index."""
    open_dataset(folder / "packed")


def large_index(folder: Path) -> Index:
    """Open an index of LARGE rows; the first time, write it."""
    path, shards = folder / "large.parquet", LARGE // SHARD_SAMPLES
    if not path.exists():
        with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
            for start in range(0, LARGE, GROUP_ROWS):
                rows = np.arange(start, min(start + GROUP_ROWS, LARGE))
                random = np.random.default_rng(start)
                columns = {
                    "shard": rows // SHARD_SAMPLES,
                    "offset": rows % SHARD_SAMPLES * 111_616 + random.integers(0, 2**16, len(rows)),
                    "size": random.integers(20_000, 200_000, len(rows)),
                    "label": random.integers(0, CLASSES, len(rows)),
                    "height": random.integers(100, 600, len(rows)),
                    "width": random.integers(100, 600, len(rows)),
                    "key": [f"n{row % CLASSES:08d}/n{row % CLASSES:08d}_{row}" for row in rows.tolist()],
                }
                writer.write_table(pa.table(columns, schema=SCHEMA), row_group_size=GROUP_ROWS)
    tars = tuple(Shard(f"train-{number:06d}.tar", SHARD_SAMPLES, 10**8, "0" * 64) for number in range(shards))
    return Index(path, Split(tars, path.name, ""))


def open_large(folder: Path) -> None:
    """Open the large index."""
    large_index(folder)


def plan_large(folder: Path) -> None:
    """Open the large index, and look up a batch of 256 in a window of 4 million samples."""
    index = large_index(folder)
    plan = TrainingPlan(index.shard_samples, seed=0, shuffle_window=4_000_000, batch_size=256, world_size=512)
    index.rows(plan.samples(3, 1))


def epoch_large(folder: Path) -> None:
    """The same for 80 batches, which is two windows."""
    index = large_index(folder)
    plan = TrainingPlan(index.shard_samples, seed=0, shuffle_window=4_000_000, batch_size=256, world_size=512)
    for step in range(80):
        index.rows(plan.samples(0, step))


STAGES: dict[str, Callable[[Path], object]] = {
    one.__name__: one
    for one in (
        list_source,
        pack_all,
        merge,
        read_tars,
        merge_index,
        open_index,
        large_index,
        open_large,
        plan_large,
        epoch_large,
    )
}


def run_stage(name: str, folder: Path) -> None:
    """Run a stage in this process and print its cost as JSON."""
    before, start = _peak(), time.perf_counter()
    STAGES[name](folder)
    print(json.dumps({"seconds": time.perf_counter() - start, "mib": _peak() - before}))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, folder: Path, label: str) -> None:
    """Run a stage in a separate process and print its cost."""
    command = [sys.executable, "-m", "benchmarks.scale", "--folder", str(folder), "--stage", name]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    cost = json.loads(answer.stdout.splitlines()[-1])
    print(f"{label:>12} {name:<12} {cost['seconds']:8.2f} s  +{cost['mib']:6.0f} MiB", flush=True)


def main() -> None:
    """Measure every stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--images", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--stage", choices=STAGES, help="run this stage alone, in this process")
    options = parser.parse_args()
    if options.stage:
        run_stage(options.stage, options.folder)
        return
    for count in options.images:
        folder = options.folder / str(count)
        make_images(folder, count)
        for name in list(STAGES)[:6]:
            measure(name, folder, f"{count:,}")
        shutil.rmtree(folder)
    for name in ("large_index", "open_large", "plan_large", "epoch_large"):
        measure(name, options.folder, f"{LARGE:,}")


if __name__ == "__main__":
    main()
