"""From the rows of all tars to the classes, the Parquet indexes and the manifest of a data set."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data.shards.dataset import SCHEMA, Dataset, Shard, Split
from data.shards.manifest import write_manifest
from data.shards.rows import SavedRows, SplitRows, is_number
from data.storage.location import Root

STATISTICS_IMAGES = 10_000
# Of an open index, each process keeps 5 kB for a row group; to look up a row, it decodes a row group.
GROUP_ROWS = 8_192


def class_names(split: SplitRows) -> tuple[str, ...]:
    """Return the sorted names that occur as labels, or "0" up to the largest number. Raises: ValueError."""
    names = sorted(label for label in split.labels if not is_number(label))
    if names:
        return tuple(names)
    for label, tar in split.labels.items():
        _check_range(label, tar, num_classes=split.samples)
    return _numbers(max(map(int, split.labels)) + 1)


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
    rows: Mapping[str, SplitRows],
    name: str,
    classes: tuple[str, ...],
    label_field: str = "label",
) -> Dataset:
    """Write indexes and manifest into `folder`. Raises: ValueError for a label that is not one of `classes`."""
    splits = {}
    for split, one in rows.items():
        _check_kinds(one)
        origin = index_origin([(tar.file, tar.bytes, tar.version) for tar in one.tars], label_field=label_field)
        splits[split] = _write_index(folder / f"{split}.parquet", one, classes=classes, origin=origin)
    colours = np.sum([tar.colours for one in rows.values() for tar in one.tars], axis=0)  # (7,)
    dataset = Dataset(root, folder, name, classes, *_mean_and_std(colours), splits)
    write_manifest(dataset)
    return dataset


def _write_index(path: Path, split: SplitRows, *, classes: tuple[str, ...], origin: str) -> Split:
    """Write an index atomically, tar by tar, in row groups of GROUP_ROWS."""
    partial_path = path.with_name(f".{path.name}.partial")
    digest = hashlib.sha256()
    tars = [tar for tar in split.tars if tar.samples]

    def tables() -> Iterator[pa.Table]:
        for number, tar in enumerate(tars):
            loaded = tar.load()
            labels = _label_numbers(tar, loaded.column("label"), classes=classes)
            shards = np.full(len(loaded), number, np.int32)
            known = {name: loaded.column(name) for name in loaded.column_names}
            columns = known | {"shard": pa.array(shards), "label": pa.array(labels)}
            table = pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)
            for name in SCHEMA.names[:-1]:
                digest.update(table.column(name).to_numpy().tobytes())
            digest.update("\n".join(table.column("key").to_pylist()).encode())
            yield table

    with pq.ParquetWriter(partial_path, SCHEMA, compression="zstd") as writer:
        for group in _regroup(tables()):
            writer.write_table(group, row_group_size=GROUP_ROWS)
    with partial_path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    partial_path.replace(path)
    shards = tuple(Shard(tar.file, tar.samples, tar.bytes, tar.sha256) for tar in tars)
    return Split(shards, path.name, digest.hexdigest(), sha256, origin)


def _regroup(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yield the rows of all tables in tables of GROUP_ROWS; the last may be smaller."""
    pending = SCHEMA.empty_table()
    for table in tables:
        pending = pa.concat_tables([pending, table])
        while len(pending) >= GROUP_ROWS:
            yield pending.slice(0, GROUP_ROWS).combine_chunks()
            pending = pending.slice(GROUP_ROWS)
    if len(pending):
        yield pending.combine_chunks()


def _mean_and_std(colours: NDArray[np.float64]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Compute mean and standard deviation of red, green and blue from the sums of `images.colour_sums`."""
    mean = colours[1:4] / colours[0]
    # Images of one colour have no deviation; 1/255 keeps their normalised pixels finite.
    std = np.maximum(np.sqrt(np.maximum(colours[4:7] / colours[0] - mean**2, 0)), 1 / 255)
    red, green, blue = mean.round(6).tolist()
    red_std, green_std, blue_std = std.round(6).tolist()
    return (red, green, blue), (red_std, green_std, blue_std)


def _label_numbers(tar: SavedRows, labels: pa.ChunkedArray, *, classes: tuple[str, ...]) -> NDArray[np.int32]:
    """Return the class of each row: (N,). Raises: ValueError for a label that is none."""
    encoded = labels.combine_chunks().dictionary_encode()
    numbers = {name: number for number, name in enumerate(classes)}
    found = []
    for label in encoded.dictionary.to_pylist():
        if is_number(label):
            _check_range(label, tar, num_classes=len(classes))
        elif label not in numbers:
            problem = f"has class {label}, which the training split does not have"
            raise ValueError(f"{tar.file}: {tar.key_of(label)} {problem}")
        found.append(int(label) if is_number(label) else numbers[label])
    of_rows: NDArray[np.int32] = np.asarray(found, np.int32)[encoded.indices.to_numpy()]
    return of_rows


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(count))


def _check_kinds(split: SplitRows) -> None:
    """Raise ValueError where some labels of a split are names and others numbers, which may be classes or names."""
    named = [label for label in split.labels if not is_number(label)]
    if named and len(named) < len(split.labels):
        tar = split.labels[named[0]]
        raise ValueError(f"{tar.file}: {tar.key_of(named[0])} has the label {named[0]} where others have numbers")


def _check_range(label: str, tar: SavedRows, *, num_classes: int) -> None:
    if not 0 <= int(label) < num_classes:
        allowed = f"0 to {num_classes - 1} (labels count from 0)"
        raise ValueError(f"{tar.file}: {tar.key_of(label)} has label {label}, outside {allowed}")
