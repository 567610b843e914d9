"""A data set on disk: its manifest `dataset.json`, its tar shards, and one Parquet index a split.

The manifest says what the data set is (classes, mean and standard deviation, shards
with their SHA-256); an index has a row a sample and a row group a shard, and says
where each image lies, so that a loader can read any sample without reading a tar.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

FORMAT = 1
MANIFEST = "dataset.json"
SPLITS = ("train", "val", "test")
SCHEMA = pa.schema(
    {
        "shard": pa.int32(),
        "offset": pa.int64(),
        "size": pa.int64(),
        "label": pa.int32(),
        "height": pa.int32(),  # after EXIF orientation, as is the width
        "width": pa.int32(),
        "key": pa.string(),
    }
)
COLUMNS = [name for name in SCHEMA.names if name != "key"]
CACHED_ROWS = 8_000_000  # 32 bytes each: two of the widest shuffle windows


@dataclass(frozen=True)
class Shard:
    """A tar of a split: `file` relative to the data set's folder, image count, size in bytes."""

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """The shards of a split and the name of its index; `digest` is the SHA-256 of the index's rows."""

    shards: tuple[Shard, ...]
    index: str
    digest: str

    @property
    def samples(self) -> int:
        """Number of images in the split."""
        return sum(shard.samples for shard in self.shards)


@dataclass(frozen=True)
class Dataset:
    """A manifest and the folders it speaks of.

    `mean` and `std` are those of the training pixels as fractions of 255, one of
    each for red, green and blue. `root` holds the tars; `folder` the manifest and
    the indexes, the same unless `root` cannot be written to.
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
        """Write the manifest, whole or not at all."""
        splits = {name: {"samples": split.samples, **asdict(split)} for name, split in self.splits.items()}
        facts = {
            "format": FORMAT,
            "name": self.name,
            "classes": self.classes,
            "mean": self.mean,
            "std": self.std,
            "splits": splits,
        }
        write_whole(self.folder / MANIFEST, json.dumps(facts, indent=1, ensure_ascii=False).encode() + b"\n")


class Rows(NamedTuple):
    """What the index says of some samples; every array is (N,)."""

    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    label: NDArray[np.int32]
    height: NDArray[np.int32]
    width: NDArray[np.int32]


class Index:
    """Where the samples of a split lie; reads only the row groups that are asked for and keeps the latest.

    Safe to use from several threads.
    """

    def __init__(self, path: Path, split: Split) -> None:
        self.path = path
        self.split = split
        self.shard_samples = tuple(shard.samples for shard in split.shards)
        self.starts = np.concatenate([[0], np.cumsum(self.shard_samples, dtype=np.int64)])
        self._file: pq.ParquetFile | None = None
        self._groups: OrderedDict[int, NDArray[np.void]] = OrderedDict()
        self._rows_kept = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def rows(self, samples: NDArray[np.int64]) -> Rows:
        """Look samples up. Shapes: (N,) rows of the index -> arrays of (N,)."""
        shards = np.searchsorted(self.starts, samples, side="right") - 1  # (N,)
        groups = self._load(np.unique(shards).tolist())
        found = np.empty(len(samples), next(iter(groups.values())).dtype)
        for shard, group in groups.items():
            here = shards == shard
            found[here] = group[samples[here] - self.starts[shard]]
        return Rows(*(np.ascontiguousarray(found[name]) for name in COLUMNS))

    def keys(self, samples: Iterable[int]) -> list[str]:
        """Each sample as `tar: key`, to name it to people. Slow: reads a row group a sample."""
        named = []
        for sample in samples:
            shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
            with self._lock:
                keys = self._open().read_row_group(shard, columns=["key"]).column("key")
            key = keys[int(sample - self.starts[shard])]
            named.append(f"{self.split.shards[shard].file}: {key}")
        return named

    def _load(self, shards: list[int]) -> dict[int, NDArray[np.void]]:
        with self._lock:
            missing = [shard for shard in shards if shard not in self._groups]
            if missing:
                self._read(missing)
            for shard in shards:
                self._groups.move_to_end(shard)
            loaded = {shard: self._groups[shard] for shard in shards}
            while self._rows_kept > CACHED_ROWS and len(self._groups) > 1:
                self._rows_kept -= len(self._groups.popitem(last=False)[1])
            return loaded

    def _open(self) -> pq.ParquetFile:
        if self._file is None:
            self._file = pq.ParquetFile(self.path)
        return self._file

    def _read(self, shards: list[int]) -> None:
        table = self._open().read_row_groups(shards, columns=COLUMNS)
        whole = np.empty(len(table), [(name, SCHEMA.field(name).type.to_pandas_dtype()) for name in COLUMNS])
        for name in COLUMNS:
            whole[name] = table.column(name).to_numpy()
        ends = np.cumsum([self.shard_samples[shard] for shard in shards])
        for shard, group in zip(shards, np.split(whole, ends[:-1]), strict=True):
            self._groups[shard] = group
            self._rows_kept += len(group)


def read_manifest(folder: Path, root: Path) -> Dataset:
    """Read `dataset.json`. Raises: ValueError when it is of another format or damaged."""
    path = folder / MANIFEST
    try:
        facts: dict[str, Any] = json.loads(path.read_bytes())
        if facts["format"] != FORMAT:
            raise ValueError(
                f"{path} has format {facts['format']}, this program reads {FORMAT}: pack the data set again"
            )
        splits = {
            name: Split(tuple(Shard(**shard) for shard in split["shards"]), split["index"], split["digest"])
            for name, split in facts["splits"].items()
        }
        classes, mean, std = tuple(facts["classes"]), tuple(facts["mean"]), tuple(facts["std"])
        return Dataset(root, folder, facts["name"], classes, mean, std, splits)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no manifest of a data set ({type(error).__name__}: {error}): "
            "remove it to have the tars indexed again, or pack the data set again"
        ) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it into it, so that nobody ever reads a part of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)
