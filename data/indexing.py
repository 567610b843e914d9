"""From a folder of WebDataset tars, ours or anybody's, to a manifest and an index.

Every tar is read once, in parallel: its SHA-256, where each image lies, its size in
pixels, its label, and the colours of its first images.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data import images
from data.dataset import MANIFEST, SCHEMA, SPLITS, Dataset, Shard, Split, read_manifest
from data.parallel import available_cores, map_tasks

STATISTICS_IMAGES = 10_000
SHARDS_WORTH_A_POOL = 4  # fewer are read before another process has imported what it needs
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class LeftOut(NamedTuple):
    """A sample that is not in the index, and why."""

    name: str
    reason: str


@dataclass
class ShardRows:
    """What one tar holds: a list a column of the index, and sums of colours as `images.colour_sums` gives them."""

    file: str
    bytes: int = 0
    sha256: str = ""
    columns: dict[str, list[int]] = field(
        default_factory=lambda: {name: [] for name in ("offset", "size", "height", "width")}
    )
    labels: list[int | str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    colours: NDArray[np.float64] = field(default_factory=lambda: np.zeros(7))


class Member(NamedTuple):
    """Where a file lies in a tar, in bytes."""

    offset: int
    size: int


def open_dataset(
    root: Path, folder: Path | None = None, *, label_field: str = "label"
) -> tuple[Dataset, list[LeftOut]]:
    """Open a data set; a folder of tars without a manifest, or changed since, is indexed first.

    `folder` is where manifest and index lie or go, `root` unless that cannot be
    written to. Also returns the samples that indexing left out, none when it was done before.

    Raises: FileNotFoundError, ValueError when this is no data set.
    """
    folder = folder or root
    if not root.is_dir():
        raise FileNotFoundError(f"data.root={root} is no folder: pack one with `python -m pipeline.pack`")
    known = read_manifest(folder, root) if (folder / MANIFEST).is_file() else None
    tars = find_tars(root)
    if known is not None and is_fresh(known, tars):
        return known, []
    name, classes = (known.name, known.classes) if known else (root.resolve().name, None)
    return index_tars(root, folder, tars, name=name, classes=classes, label_field=label_field)


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
        raise ValueError(
            f"data.root={root} is no data set: it holds neither {MANIFEST} nor a .tar file "
            f"(class folders: python -m pipeline.pack source=folder source.root={root} name=NAME)"
        )
    return {split: splits[split] for split in SPLITS if split in splits}


def is_fresh(dataset: Dataset, tars: dict[str, list[str]]) -> bool:
    """Whether the indexes have seen these tars, each with its present size and modification time."""
    paths = {split: dataset.folder / facts.index for split, facts in dataset.splits.items()}
    if paths.keys() != tars.keys() or not all(path.is_file() for path in paths.values()):
        return False
    return all(
        json.loads(pq.read_schema(paths[split]).metadata[b"tars"]) == _stamps(dataset.root, files)
        for split, files in tars.items()
    )


def index_tars(
    root: Path,
    folder: Path,
    tars: dict[str, list[str]],
    *,
    name: str,
    classes: tuple[str, ...] | None,
    label_field: str,
) -> tuple[Dataset, list[LeftOut]]:
    """Read every tar and write the indexes and the manifest; return the data set and what was left out.

    Raises: ValueError for a tar cut short, a split without a labelled image, a label out of range.
    """
    shards: dict[str, list[ShardRows]] = {}
    for split, files in tars.items():
        sample = -(-STATISTICS_IMAGES // len(files)) if split == "train" or "train" not in tars else 0
        read = partial(read_shard, root, label_field=label_field, statistics_images=sample)
        workers = available_cores() if len(files) > SHARDS_WORTH_A_POOL else 1
        shards[split] = map_tasks(read, files, workers=workers, label=f"index {split}")
        if not any(shard.labels for shard in shards[split]):
            raise ValueError(_nothing_found(root, split, shards[split], label_field))
    classes = classes or class_names(shards.get("train") or next(iter(shards.values())))
    dataset = assemble(root, folder, shards, name=name, classes=classes)
    return dataset, [sample for rows in shards.values() for shard in rows for sample in shard.left_out]


def assemble(
    root: Path, folder: Path, shards: dict[str, list[ShardRows]], *, name: str, classes: tuple[str, ...]
) -> Dataset:
    """Write the indexes and the manifest into `folder` from what was read of each split's tars in `root`.

    Raises: ValueError when a label is out of range.
    """
    folder.mkdir(parents=True, exist_ok=True)
    splits = {split: write_index(root, folder, split, rows, classes) for split, rows in shards.items()}
    colours = np.sum([shard.colours for rows in shards.values() for shard in rows], axis=0)  # (7,)
    mean, std = mean_and_std(colours)
    dataset = Dataset(root, folder, name, classes, mean, std, splits)
    dataset.write()
    return dataset


def read_shard(root: Path, file: str, *, label_field: str, statistics_images: int) -> ShardRows:
    """Read one tar. Raises: ValueError when it is cut short or no tar."""
    shard = ShardRows(file)
    with open(root / file, "rb") as stream:
        shard.sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        shard.bytes = stream.tell()
        try:
            members = list_members(stream)
        except tarfile.TarError as error:
            raise ValueError(f"{root / file} is damaged or cut short ({error}): copy or pack it again") from error
        for key, files in members.items():
            try:
                _read_sample(stream, shard, key, files, label_field)
            except ValueError as error:
                shard.left_out.append(LeftOut(f"{root / file}: {key}", str(error)))
        for offset, size in list(zip(shard.columns["offset"], shard.columns["size"], strict=True))[:statistics_images]:
            try:
                shard.colours += images.colour_sums(_bytes_at(stream, Member(offset, size)))
            except images.UnreadableImage:
                continue  # its header was right; the loader names it if it is ever asked for
    return shard


def list_members(stream: BinaryIO) -> dict[str, dict[str, Member]]:
    """The files of a tar by sample key and lower-case suffix; a key ends at the first dot of the file's name.

    Raises: tarfile.TarError when the tar does not end as a tar ends.
    """
    samples: dict[str, dict[str, Member]] = {}
    stream.seek(0)
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            folder, slash, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            if member.isfile() and stem and not stem.startswith("__"):
                files = samples.setdefault(folder + slash + stem, {})
                files[suffix.lower()] = Member(member.offset_data, member.size)
        stream.seek(tar.offset)
    # A tar ends in blocks of zeros. Python takes one that was cut between two files, or goes on as garbage, for whole.
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("no end-of-archive mark after the last whole file")
    return samples


def write_index(root: Path, folder: Path, split: str, shards: list[ShardRows], classes: tuple[str, ...]) -> Split:
    """Write `<split>.parquet` with a row group a shard that holds samples, whole or not at all.

    Raises: ValueError when a label is none of `classes`.
    """
    path = folder / f"{split}.parquet"
    partial_path = folder / f".{path.name}.partial"
    digest = hashlib.sha256()
    schema = SCHEMA.with_metadata({"tars": json.dumps(_stamps(root, [shard.file for shard in shards]))})
    shards = [shard for shard in shards if shard.keys]
    with pq.ParquetWriter(partial_path, schema, compression="zstd") as writer:
        for number, shard in enumerate(shards):
            columns = {
                "shard": [number] * len(shard.keys),
                "key": shard.keys,
                "label": numbered(shard, classes),
                **shard.columns,
            }
            table = pa.table({name: columns[name] for name in SCHEMA.names}, schema=schema)
            writer.write_table(table, row_group_size=len(table))
            for name in SCHEMA.names[:-1]:
                digest.update(table.column(name).to_numpy().tobytes())
            digest.update("\n".join(shard.keys).encode())
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


def _read_sample(stream: BinaryIO, shard: ShardRows, key: str, files: dict[str, Member], label_field: str) -> None:
    image = next((files[suffix] for suffix in images.SUFFIXES if suffix in files), None)
    if image is None:
        raise ValueError(f"no {', '.join(images.SUFFIXES)} file")
    label = _label(stream, files, label_field)
    height, width = images.oriented_size(_bytes_at(stream, image))
    for name, value in (("offset", image.offset), ("size", image.size), ("height", height), ("width", width)):
        shard.columns[name].append(value)
    shard.labels.append(label)
    shard.keys.append(key)


def _label(stream: BinaryIO, files: dict[str, Member], label_field: str) -> int | str:
    if "cls" in files:
        label = _bytes_at(stream, files["cls"]).decode(errors="replace").strip()
    elif "json" in files:
        fields = json.loads(_bytes_at(stream, files["json"]))
        if not isinstance(fields, dict) or label_field not in fields:
            found = ", ".join(fields) if isinstance(fields, dict) else type(fields).__name__
            raise ValueError(f"its .json has no field {label_field} (data.label_field=NAME names another): {found}")
        label = str(fields[label_field]).strip()
    else:
        raise ValueError("no label: neither a .cls nor a .json file")
    return int(label) if re.fullmatch(r"[+-]?\d+", label) else label


def _stamps(root: Path, files: list[str]) -> list[list[str | int]]:
    """Name, size in bytes and modification time in nanoseconds of each tar."""
    found = [(file, os.stat(root / file)) for file in files]
    return [[file, status.st_size, status.st_mtime_ns] for file, status in found]


def _bytes_at(stream: BinaryIO, member: Member) -> bytes:
    stream.seek(member.offset)
    return stream.read(member.size)


def _check_range(shard: ShardRows, num_classes: int) -> None:
    for key, label in zip(shard.keys, shard.labels, strict=True):
        if not isinstance(label, int):
            raise ValueError(f"{shard.file}: {key} has the label {label} where others have numbers")
        if not 0 <= label < num_classes:
            raise ValueError(f"{shard.file}: {key} has label {label}, out of range: 0 to {num_classes - 1} are allowed")


def _nothing_found(root: Path, split: str, shards: list[ShardRows], label_field: str) -> str:
    left_out = [sample for shard in shards for sample in shard.left_out]
    why = f"; {left_out[0].name}: {left_out[0].reason}" if left_out else ""
    kinds = f".cls, or field {label_field} of .json"
    return f"data.root={root}: the tars of split {split} hold no image with a label ({kinds}){why}"
