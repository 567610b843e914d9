"""From the rows of all tars to the classes, the Parquet indexes and the manifest of a data set."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data.shards.dataset import SCHEMA, Dataset, Shard, Split
from data.shards.manifest import write_manifest
from data.shards.tars import SampleRow, ShardRows
from data.storage.location import Root

STATISTICS_IMAGES = 10_000


def class_names(shards: list[ShardRows]) -> tuple[str, ...]:
    """Return the sorted names that occur as labels, or "0" up to the largest number. Raises: ValueError."""
    labels = {row.label for shard in shards for row in shard.rows}
    names = sorted(str(label) for label in labels if isinstance(label, str))
    if names:
        return tuple(names)
    num_samples = sum(len(shard.rows) for shard in shards)
    for shard in shards:
        _check_range(shard, num_samples)
    return _numbers(max(int(label) for label in labels) + 1)


def merge_classes(manifest: tuple[str, ...], tars: tuple[str, ...]) -> tuple[str, ...]:
    """Return the manifest's names where the tars have only numbers, otherwise those of the tars."""
    only_numbers = tars == _numbers(len(tars))
    return manifest if only_numbers and manifest != _numbers(len(manifest)) else tars


def statistics_shares(num_shards: int) -> list[int]:
    """Distribute STATISTICS_IMAGES, the images decoded for mean and standard deviation, evenly over the shards."""
    total = STATISTICS_IMAGES
    return [(number + 1) * total // num_shards - number * total // num_shards for number in range(num_shards)]


def index_origin(tars: list[tuple[str, int, int | str]], *, label_field: str) -> str:
    """Return a digest of an index's origin: the label field; name, size in bytes and version of each tar.

    The version is the modification time in nanoseconds, or the ETag of an object.
    """
    return hashlib.sha256(json.dumps({"label_field": label_field, "tars": tars}).encode()).hexdigest()


def write_dataset(
    root: Root,
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
        _check_kinds(rows)
        origin = index_origin([(shard.file, shard.bytes, shard.version) for shard in rows], label_field=label_field)
        splits[split] = _write_index(folder / f"{split}.parquet", rows, classes=classes, origin=origin)
    colours = np.sum([shard.colours for rows in shards.values() for shard in rows], axis=0)  # (7,)
    dataset = Dataset(root, folder, name, classes, *_mean_and_std(colours), splits)
    write_manifest(dataset)
    return dataset


def _write_index(path: Path, shards: list[ShardRows], *, classes: tuple[str, ...], origin: str) -> Split:
    """Write an index atomically, a row group per shard with samples."""
    partial_path = path.with_name(f".{path.name}.partial")
    digest = hashlib.sha256()
    shards = [shard for shard in shards if shard.rows]
    with pq.ParquetWriter(partial_path, SCHEMA, compression="zstd") as writer:
        for number, shard in enumerate(shards):
            columns = {name: [getattr(row, name) for row in shard.rows] for name in SampleRow._fields}
            columns |= {"shard": [number] * len(shard.rows), "label": _label_numbers(shard, classes)}
            table = pa.table(columns, schema=SCHEMA)  # in the schema's order
            writer.write_table(table, row_group_size=len(table))
            for name in SCHEMA.names[:-1]:
                digest.update(table.column(name).to_numpy().tobytes())
            digest.update("\n".join(columns["key"]).encode())
    with partial_path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    partial_path.replace(path)
    tars = tuple(Shard(shard.file, len(shard.rows), shard.bytes, shard.sha256) for shard in shards)
    return Split(tars, path.name, digest.hexdigest(), sha256, origin)


def _mean_and_std(colours: NDArray[np.float64]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Compute mean and standard deviation of red, green and blue from the sums of `images.colour_sums`."""
    mean = colours[1:4] / colours[0]
    # Images of one colour have no deviation; 1/255 keeps their normalised pixels finite.
    std = np.maximum(np.sqrt(np.maximum(colours[4:7] / colours[0] - mean**2, 0)), 1 / 255)
    red, green, blue = mean.round(6).tolist()
    red_std, green_std, blue_std = std.round(6).tolist()
    return (red, green, blue), (red_std, green_std, blue_std)


def _label_numbers(shard: ShardRows, classes: tuple[str, ...]) -> list[int]:
    if any(isinstance(row.label, int) for row in shard.rows):
        _check_range(shard, len(classes))
        return [int(row.label) for row in shard.rows]
    numbers = {name: number for number, name in enumerate(classes)}
    for row in shard.rows:
        if row.label not in numbers:
            raise ValueError(f"{shard.file}: {row.key} has class {row.label}, which the training split does not have")
    return [numbers[str(row.label)] for row in shard.rows]


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(count))


def _check_kinds(shards: list[ShardRows]) -> None:
    """Raise ValueError where some labels of a split are names and others numbers, which may be classes or names."""
    if len({type(row.label) for shard in shards for row in shard.rows}) > 1:
        file, row = next((shard.file, row) for shard in shards for row in shard.rows if isinstance(row.label, str))
        raise ValueError(f"{file}: {row.key} has the label {row.label} where others have numbers")


def _check_range(shard: ShardRows, num_classes: int) -> None:
    for row in shard.rows:
        if not 0 <= int(row.label) < num_classes:
            allowed = f"0 to {num_classes - 1} (labels count from 0)"
            raise ValueError(f"{shard.file}: {row.key} has label {row.label}, outside {allowed}")
