"""From a folder of WebDataset tars, ours or anybody's, to a manifest and an index: every tar read once, in parallel."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from numpy.typing import NDArray

from data.shards import images
from data.shards.dataset import MANIFEST, SCHEMA, SPLITS, Dataset, Shard, Split, read_manifest
from data.shards.parallel import available_cores, map_tasks
from data.shards.tars import LeftOut, ShardRows, read_shard

STATISTICS_IMAGES = 10_000
SHARDS_WORTH_A_POOL = 4  # fewer are read before another process has imported what it needs
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class TarTask(NamedTuple):
    """A tar to read, and of how many of its images to take the colours."""

    file: str
    statistics_images: int


def open_dataset(
    root: Path, folder: Path | None = None, *, label_field: str = "label"
) -> tuple[Dataset, list[LeftOut]]:
    """Open a data set; a folder of tars without a manifest, or changed since, is indexed first, by one process.

    `folder` is where manifest and index lie or go, `root` unless that cannot be
    written to. Also returns the samples that indexing left out, none when it was done before.

    Raises: FileNotFoundError, ValueError when this is no data set; PermissionError.
    """
    folder = folder or root
    if root.is_file():
        raise ValueError(f"data.root={root} is a file: give the folder that holds it")
    if not root.is_dir():
        raise FileNotFoundError(f"data.root={root} is no folder: pack one with `python -m pipeline.pack`")
    tars = find_tars(root)
    known = fresh_dataset(root, folder, tars=tars, label_field=label_field)
    if known is not None:
        return known, []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            known = fresh_dataset(root, folder, tars=tars, label_field=label_field)  # another process was faster
            return (known, []) if known else index_tars(root, folder, tars=tars, label_field=label_field)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PermissionError(f"{error}: data.index=FOLDER puts manifest and index elsewhere") from error
        raise


def find_tars(root: Path) -> dict[str, list[str]]:
    """The tars below `root` by split, which is told from the words of their names; `train` where none is.

    Raises: ValueError when there is no tar.
    """
    splits: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*.tar")):
        file = path.relative_to(root).as_posix()
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            continue
        words = re.split(r"[^a-z]+", file.lower())
        split = next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train")
        splits.setdefault(split, []).append(file)
    if not splits:
        packed = next((path for pattern in ("*.tar.*", "*.tgz") for path in root.rglob(pattern)), None)
        if packed is not None:
            raise ValueError(f"{packed} is compressed, so nothing in it has a position: unpack it to a .tar")
        raise ValueError(
            f"data.root={root} is no data set: it holds neither {MANIFEST} nor a .tar file "
            f"(class folders: python -m pipeline.pack source=folder source.root={root} name=NAME)"
        )
    return {split: splits[split] for split in SPLITS if split in splits}


def fresh_dataset(root: Path, folder: Path, *, tars: dict[str, list[str]], label_field: str) -> Dataset | None:
    """The data set as its manifest has it, when that belongs to its indexes and these saw the tars as they now are."""
    if not (folder / MANIFEST).is_file():
        return None
    dataset = read_manifest(folder, root)
    if dataset.splits.keys() != tars.keys():
        return None
    for name, split in dataset.splits.items():
        path = folder / split.index
        seen = pq.read_metadata(path).metadata if path.is_file() else {}
        found = [(file, os.stat(root / file)) for file in tars[name]]
        made = _made([(file, status.st_size, status.st_mtime_ns) for file, status in found], label_field=label_field)
        if (seen.get(b"made"), seen.get(b"digest")) != (made, split.digest.encode()):
            return None
    return dataset


def index_tars(
    root: Path, folder: Path, *, tars: dict[str, list[str]], label_field: str
) -> tuple[Dataset, list[LeftOut]]:
    """Read every tar and write the indexes and the manifest; return the data set and what was left out.

    Raises: ValueError for a tar cut short, a split without a labelled image, a label out of range.
    """
    shards: dict[str, list[ShardRows]] = {}
    for split, files in tars.items():
        measured = split == "train" or "train" not in tars
        counts = statistics_shares(len(files)) if measured else [0] * len(files)
        tasks = [TarTask(file, count) for file, count in zip(files, counts, strict=True)]
        read = partial(read_task, root, label_field=label_field)
        workers = available_cores() if len(files) > SHARDS_WORTH_A_POOL else 1
        shards[split] = map_tasks(read, tasks, workers=workers, label=f"index {split}")
        if not any(shard.labels for shard in shards[split]):
            where = f"data.root={root}: the tars of split {split}"
            raise ValueError(_nothing_found(where, shards[split], label_field=label_field))
    name, classes = root.resolve().name, class_names(shards.get("train") or next(iter(shards.values())))
    if (folder / MANIFEST).is_file():
        known = read_manifest(folder, root)
        name, classes = known.name, known_classes(known.classes, classes)
    dataset = assemble(root, folder, shards=shards, name=name, classes=classes, label_field=label_field)
    return dataset, [sample for rows in shards.values() for shard in rows for sample in shard.left_out]


def read_task(root: Path, task: TarTask, *, label_field: str) -> ShardRows:
    """`read_shard`, as another process is asked for it."""
    count = task.statistics_images
    return read_shard(root, task.file, label_field=label_field, statistics_images=count, size_of=images.whole_size)


def statistics_shares(num_shards: int) -> list[int]:
    """How many images of each shard to look at for mean and standard deviation: STATISTICS_IMAGES in all at most."""
    ends = [number * STATISTICS_IMAGES // num_shards for number in range(num_shards + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def assemble(
    root: Path,
    folder: Path,
    *,
    shards: dict[str, list[ShardRows]],
    name: str,
    classes: tuple[str, ...],
    label_field: str = "label",
) -> Dataset:
    """Write the indexes and the manifest into `folder` from what was read of each split's tars in `root`.

    Raises: ValueError when a label is out of range.
    """
    splits = {}
    for split, rows in shards.items():
        made = _made([(shard.file, shard.bytes, shard.modified_ns) for shard in rows], label_field=label_field)
        splits[split] = write_index(folder / f"{split}.parquet", rows, classes=classes, made=made)
    colours = np.sum([shard.colours for rows in shards.values() for shard in rows], axis=0)  # (7,)
    mean, std = mean_and_std(colours)
    dataset = Dataset(root, folder, name, classes, mean, std, splits)
    dataset.write()
    return dataset


def write_index(path: Path, shards: list[ShardRows], *, classes: tuple[str, ...], made: bytes) -> Split:
    """Write an index with a row group a shard that holds samples, whole or not at all; `made` says from what.

    Raises: ValueError when a label is none of `classes`.
    """
    partial_path = path.with_name(f".{path.name}.partial")
    digest = hashlib.sha256()
    shards = [shard for shard in shards if shard.keys]
    with pq.ParquetWriter(partial_path, SCHEMA, compression="zstd") as writer:
        for number, shard in enumerate(shards):
            columns = {
                "shard": [number] * len(shard.keys),
                "key": shard.keys,
                "label": numbered(shard, classes),
                **shard.columns,
            }
            table = pa.table({name: columns[name] for name in SCHEMA.names}, schema=SCHEMA)
            writer.write_table(table, row_group_size=len(table))
            for name in SCHEMA.names[:-1]:
                digest.update(table.column(name).to_numpy().tobytes())
            digest.update("\n".join(shard.keys).encode())
        writer.add_key_value_metadata({"made": made, "digest": digest.hexdigest()})
    partial_path.replace(path)
    facts = tuple(Shard(shard.file, len(shard.keys), shard.bytes, shard.sha256) for shard in shards)
    return Split(facts, path.name, digest.hexdigest())


def class_names(shards: list[ShardRows]) -> tuple[str, ...]:
    """The classes that labels speak of: sorted names, or "0" up to the largest number.

    Raises: ValueError for a number that is negative or larger than there are samples.
    """
    labels = {label for shard in shards for label in shard.labels}
    names = sorted(str(label) for label in labels if isinstance(label, str))
    if names:
        return tuple(names)
    num_samples = sum(len(shard.labels) for shard in shards)
    for shard in shards:
        _check_range(shard, num_samples)
    return tuple(str(number) for number in range(max(int(label) for label in labels) + 1))


def known_classes(known: tuple[str, ...], found: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a manifest, which stand for the numbers in our tars; `found` where the tars themselves name them."""

    def counted(names: tuple[str, ...]) -> bool:
        return names == tuple(str(number) for number in range(len(names)))

    return known if counted(found) and not counted(known) else found


def numbered(shard: ShardRows, classes: tuple[str, ...]) -> list[int]:
    """The shard's labels as positions in `classes`. Raises: ValueError for one that is not there."""
    if any(isinstance(label, int) for label in shard.labels):
        _check_range(shard, len(classes))
        return [int(label) for label in shard.labels]
    number = {name: position for position, name in enumerate(classes)}
    for key, label in zip(shard.keys, shard.labels, strict=True):
        if label not in number:
            raise ValueError(f"{shard.file}: {key} has class {label}, which the training split does not have")
    return [number[str(label)] for label in shard.labels]


def mean_and_std(colours: NDArray[np.float64]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of red, green and blue from sums as `images.colour_sums` gives them."""
    mean = colours[1:4] / colours[0]
    # One grey everywhere has no deviation; 1/255 keeps its normalised pixels finite.
    std = np.maximum(np.sqrt(np.maximum(colours[4:7] / colours[0] - mean**2, 0)), 1 / 255)
    red, green, blue = (round(float(value), 6) for value in mean)
    red_std, green_std, blue_std = (round(float(value), 6) for value in std)
    return (red, green, blue), (red_std, green_std, blue_std)


def _made(tars: list[tuple[str, int, int]], *, label_field: str) -> bytes:
    """From what an index is made: the label's field, and each tar's name, size in bytes and modification time."""
    return json.dumps({"label_field": label_field, "tars": tars}).encode()


def _check_range(shard: ShardRows, num_classes: int) -> None:
    for key, label in zip(shard.keys, shard.labels, strict=True):
        if not isinstance(label, int):
            raise ValueError(f"{shard.file}: {key} has the label {label} where others have numbers")
        if not 0 <= label < num_classes:
            allowed = f"0 to {num_classes - 1}, as there are no more classes, or images to have them"
            raise ValueError(f"{shard.file}: {key} has label {label}, out of range: {allowed}")


def _nothing_found(where: str, shards: list[ShardRows], *, label_field: str) -> str:
    left_out = [sample for shard in shards for sample in shard.left_out]
    why = f"; {left_out[0].name}: {left_out[0].reason}" if left_out else ""
    return f"{where} hold no image with a label (.cls, or field {label_field} of .json){why}"
