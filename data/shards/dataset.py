"""A data set on disk: its manifest `dataset.json`, its tar shards, and one Parquet index per split.

An index has a row per sample, in the order of the shards. It gives the position of each image in its tar.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data.storage.location import Root

SPLITS = ("train", "val", "test")
ROWS_FOLDER = ".rows"  # beside the index, while that is made
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
    """The shards of a split and the file name of its index.

    `digest` is the SHA-256 of the index's rows, `index_sha256` that of its file. `origin` is the SHA-256 of what the
    index was made from: it changes with the tars' modification times, which do not matter to the data set.
    """

    shards: tuple[Shard, ...]
    index: str
    digest: str
    index_sha256: str = ""
    origin: str = field(default="", compare=False)

    @property
    def samples(self) -> int:
        """Number of images in the split."""
        return sum(shard.samples for shard in self.shards)


@dataclass(frozen=True)
class Dataset:
    """A manifest; `root` is the folder or URL of the tars, `folder` that of manifest and indexes, usually the same.

    `mean` and `std` are those of the training pixels, or of all without a split train: red, green and blue as
    fractions of 255. `is_edited` is whether a person has removed the digest of the manifest.
    """

    root: Root
    folder: Path
    name: str
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    splits: dict[str, Split]
    is_edited: bool = field(default=False, compare=False)

    @property
    def shard_bytes(self) -> dict[str, int]:
        """The size of every tar, of all splits."""
        return {shard.file: shard.bytes for split in self.splits.values() for shard in split.shards}

    def index(self, split: str) -> Index:
        """Open the index of a split. Raises: ValueError when the data set has no such split."""
        if split not in self.splits:
            raise ValueError(f"{self.folder} has no split {split}, only {', '.join(self.splits)}: pack or add its tars")
        return Index(self.folder / self.splits[split].index, self.splits[split])


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
    """The positions, labels and sizes of a split's samples, read and cached by shard.

    Several threads may use it: `_lock` guards the Parquet file and the cache, all else is constant.
    """

    def __init__(self, path: Path, split: Split) -> None:
        self.split = split
        self.shard_samples = tuple(shard.samples for shard in split.shards)
        self.starts = np.concatenate([[0], np.cumsum(self.shard_samples, dtype=np.int64)])
        self._lock = threading.RLock()
        self._file = pq.ParquetFile(path)
        metadata = self._file.metadata
        groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        self._groups = np.concatenate([[0], np.cumsum(groups, dtype=np.int64)])  # first row of each
        self._shard = lru_cache(max(1, CACHED_ROWS * len(split.shards) // len(self)))(self._read_shard)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def rows(self, samples: NDArray[np.int64]) -> Rows:
        """Look samples up. Shapes: (N,) rows of the index -> arrays of (N,)."""
        shards = np.searchsorted(self.starts, samples, side="right") - 1  # (N,)
        rows = np.empty(len(samples), ROW)
        for number in np.unique(shards).tolist():
            with self._lock:
                shard = self._shard(number)
            here = shards == number
            rows[here] = shard[samples[here] - self.starts[number]]
        return Rows(*(np.ascontiguousarray(rows[name]) for name in Rows._fields))

    def keys(self, samples: Iterable[int]) -> list[str]:
        """Return the names of samples, `tar: key`, for messages. Slow: reads a shard per sample."""
        names = []
        for sample in samples:
            shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
            key = self._read(shard, columns=["key"]).column("key")[int(sample - self.starts[shard])]
            names.append(f"{self.split.shards[shard].file}: {key}")
        return names

    def names(self) -> Iterator[tuple[str, str]]:
        """Yield tar and key of every sample, in the order of the index."""
        for number, shard in enumerate(self.split.shards):
            keys = self._read(number, columns=["key"]).column("key").to_pylist()
            yield from ((shard.file, key) for key in keys)

    def _read(self, shard: int, *, columns: list[str]) -> pa.Table:
        """Read columns of a shard, which may be a part of a row group or more than one."""
        start, end = self.starts[shard : shard + 2].tolist()
        first, last = np.searchsorted(self._groups, [start, end - 1], side="right").tolist()
        with self._lock:
            table = self._file.read_row_groups(range(first - 1, last), columns=columns)
        return table.slice(start - int(self._groups[first - 1]), end - start)

    def _read_shard(self, number: int) -> NDArray[np.void]:
        table = self._read(number, columns=list(Rows._fields))
        rows = np.empty(len(table), ROW)
        for name in Rows._fields:
            rows[name] = table.column(name).to_numpy()
        return rows


def check_index(path: Path, split: Split) -> None:
    """Raise ValueError when an index is not the file that was written: other rows or labels could be in it.

    Parquet has checksums of pages, but none of its metadata. This reads the file once: 0.02 s for 1,281,000 images
    (29 MiB, in the page cache, AMD EPYC).
    """
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != split.index_sha256:
        raise ValueError(f"{path} is damaged: remove it to have the tars indexed again")


def partial_folder(folder: Path) -> Path:
    """Return the place of a data set that is being packed into `folder`."""
    return folder.with_name(f".{folder.name}.partial")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside `path` and rename it, so that neither a reader nor a crash gets a part of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk has none
        raise
    finally:
        partial.unlink(missing_ok=True)
