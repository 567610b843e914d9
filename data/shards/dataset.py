"""A data set on disk: its manifest `dataset.json`, its tar shards, and one Parquet index per split.

An index has a row per sample and a row group per shard. It gives the position of each image in its tar.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

FORMAT = 1
MANIFEST = "dataset.json"
SPLITS = ("train", "val", "test")
CACHED_ROWS = 8_000_000  # 32 bytes each: two of the widest shuffle windows


@dataclass(frozen=True)
class Shard:
    """A tar of a split: `file` relative to the data set's folder, number of images, size in bytes."""

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """The shards of a split and the file name of its index; `digest` is the SHA-256 of the index's rows."""

    shards: tuple[Shard, ...]
    index: str
    digest: str

    @property
    def samples(self) -> int:
        """Number of images in the split."""
        return sum(shard.samples for shard in self.shards)


@dataclass(frozen=True)
class Dataset:
    """A manifest; `root` is the folder of the tars, `folder` that of manifest and indexes, usually the same.

    `mean` and `std` are those of the training pixels, or of all without a split train: red, green and blue as
    fractions of 255.
    """

    root: Path
    folder: Path
    name: str
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    splits: dict[str, Split]

    def index(self, split: str) -> Index:
        """Open the index of a split. Raises: ValueError when the data set has no such split."""
        if split not in self.splits:
            raise ValueError(f"{self.folder} has no split {split}, only {', '.join(self.splits)}: pack or add its tars")
        return Index(self.folder / self.splits[split].index, self.splits[split])

    def write(self) -> None:
        """Write the manifest atomically."""
        splits = {name: {"samples": split.samples, **asdict(split)} for name, split in self.splits.items()}
        facts = {"name": self.name, "classes": self.classes, "mean": self.mean, "std": self.std}
        manifest = {"format": FORMAT, **facts, "splits": splits}
        write_atomically(self.folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n")


class Rows(NamedTuple):
    """Rows of an index by column, all (N,); height and width are those after EXIF orientation."""

    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    label: NDArray[np.int32]
    height: NDArray[np.int32]
    width: NDArray[np.int32]


ROW = np.dtype({"names": Rows._fields, "formats": ("i4", "i8", "i8", "i4", "i4", "i4")})
SCHEMA = pa.schema([*((name, pa.from_numpy_dtype(ROW[name])) for name in Rows._fields), ("key", pa.string())])


class Index:
    """The positions, labels and sizes of a split's samples, read by row group and cached.

    Several threads may use it: `_lock` guards the Parquet file and the cache, all else is constant.
    """

    def __init__(self, path: Path, split: Split) -> None:
        self.split = split
        self.shard_samples = tuple(shard.samples for shard in split.shards)
        self.starts = np.concatenate([[0], np.cumsum(self.shard_samples, dtype=np.int64)])
        self._lock = threading.Lock()
        self._file = pq.ParquetFile(path)
        self._group = lru_cache(max(1, CACHED_ROWS * len(split.shards) // len(self)))(self._read_group)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def rows(self, samples: NDArray[np.int64]) -> Rows:
        """Look samples up. Shapes: (N,) rows of the index -> arrays of (N,)."""
        shards = np.searchsorted(self.starts, samples, side="right") - 1  # (N,)
        rows = np.empty(len(samples), ROW)
        for shard in np.unique(shards).tolist():
            with self._lock:
                group = self._group(shard)
            here = shards == shard
            rows[here] = group[samples[here] - self.starts[shard]]
        return Rows(*(np.ascontiguousarray(rows[name]) for name in Rows._fields))

    def keys(self, samples: Iterable[int]) -> list[str]:
        """Return the names of samples, `tar: key`, for messages. Slow: reads a row group per sample."""
        names = []
        for sample in samples:
            shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
            with self._lock:
                keys = self._file.read_row_group(shard, columns=["key"]).column("key")
            names.append(f"{self.split.shards[shard].file}: {keys[int(sample - self.starts[shard])]}")
        return names

    def names(self) -> Iterator[tuple[str, str]]:
        """Yield tar and key of every sample, in the order of the index."""
        for number, shard in enumerate(self.split.shards):
            with self._lock:
                keys = self._file.read_row_group(number, columns=["key"]).column("key").to_pylist()
            yield from ((shard.file, key) for key in keys)

    def _read_group(self, shard: int) -> NDArray[np.void]:
        table = self._file.read_row_group(shard, columns=list(Rows._fields))
        rows = np.empty(len(table), ROW)
        for name in Rows._fields:
            rows[name] = table.column(name).to_numpy()
        return rows


def read_manifest(folder: Path, root: Path) -> Dataset:
    """Read the manifest. Raises: ValueError when it has another format or is damaged."""
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        if (version := manifest["format"]) != FORMAT:
            raise ValueError(f"{path} has format {version}, this program reads {FORMAT}: pack the data set again")
        splits = {}
        for name, split in manifest["splits"].items():
            splits[name] = Split(tuple(Shard(**shard) for shard in split["shards"]), split["index"], split["digest"])
            for file in (split["index"], *(shard.file for shard in splits[name].shards)):
                if Path(file).is_absolute() or ".." in Path(file).parts:  # it may come from someone else
                    raise ValueError(f"{path} lists {file}, which is outside of its folder: pack the data set again")
        classes, mean, std = (tuple(manifest[name]) for name in ("classes", "mean", "std"))
        return Dataset(root, folder, manifest["name"], classes, mean, std, splits)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        advice = "remove it to have the tars indexed again, or pack the data set again"
        reason = f"{path} is not the manifest of a data set ({type(error).__name__}: {error})"
        raise ValueError(f"{reason}: {advice}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside `path` and rename it, so that no reader gets a part of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
