"""From the rows of all tars to the Parquet indexes and the manifest of a data set."""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data.shards.classes import label_numbers
from data.shards.dataset import SCHEMA, Dataset, Shard, Split
from data.shards.tars import SampleRow, ShardRows

STATISTICS_IMAGES = 10_000


def statistics_shares(num_shards: int) -> list[int]:
    """Distribute STATISTICS_IMAGES, the images decoded for mean and standard deviation, evenly over the shards."""
    ends = [number * STATISTICS_IMAGES // num_shards for number in range(num_shards + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def index_origin(tars: list[tuple[str, int, int]], *, label_field: str) -> bytes:
    """Encode the origin of an index: the label field; name, size in bytes and modification time of each tar."""
    return json.dumps({"label_field": label_field, "tars": tars}).encode()


def write_dataset(
    root: Path,
    folder: Path,
    *,
    shards: dict[str, list[ShardRows]],
    name: str,
    classes: tuple[str, ...],
    label_field: str = "label",
) -> Dataset:
    """Write indexes and manifest into `folder`. Raises: ValueError for a label that is not one of `classes`."""
    splits = {}
    for split, rows in shards.items():
        tars = [(shard.file, shard.bytes, shard.modified_ns) for shard in rows]
        origin = index_origin(tars, label_field=label_field)
        splits[split] = write_index(folder / f"{split}.parquet", rows, classes=classes, origin=origin)
    colours = np.sum([shard.colours for rows in shards.values() for shard in rows], axis=0)  # (7,)
    mean, std = mean_and_std(colours)
    dataset = Dataset(root, folder, name, classes, mean, std, splits)
    dataset.write()
    return dataset


def write_index(path: Path, shards: list[ShardRows], *, classes: tuple[str, ...], origin: bytes) -> Split:
    """Write an index atomically, a row group per shard with samples. Raises: ValueError."""
    partial_path = path.with_name(f".{path.name}.partial")
    digest = hashlib.sha256()
    shards = [shard for shard in shards if shard.rows]
    with pq.ParquetWriter(partial_path, SCHEMA, compression="zstd") as writer:
        for number, shard in enumerate(shards):
            columns = {name: [getattr(row, name) for row in shard.rows] for name in SampleRow._fields}
            columns |= {"shard": [number] * len(shard.rows), "label": label_numbers(shard, classes)}
            table = pa.table(columns, schema=SCHEMA)  # in the schema's order
            writer.write_table(table, row_group_size=len(table))
            for name in SCHEMA.names[:-1]:
                digest.update(table.column(name).to_numpy().tobytes())
            digest.update("\n".join(columns["key"]).encode())
        writer.add_key_value_metadata({"made": origin, "digest": digest.hexdigest()})
    partial_path.replace(path)
    tars = tuple(Shard(shard.file, len(shard.rows), shard.bytes, shard.sha256) for shard in shards)
    return Split(tars, path.name, digest.hexdigest())


def mean_and_std(colours: NDArray[np.float64]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Compute mean and standard deviation of red, green and blue from the sums of `images.colour_sums`."""
    mean = colours[1:4] / colours[0]
    # Images of one colour have no deviation; 1/255 keeps their normalised pixels finite.
    std = np.maximum(np.sqrt(np.maximum(colours[4:7] / colours[0] - mean**2, 0)), 1 / 255)
    red, green, blue = (round(float(value), 6) for value in mean)
    red_std, green_std, blue_std = (round(float(value), 6) for value in std)
    return (red, green, blue), (red_std, green_std, blue_std)
