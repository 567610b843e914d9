"""Rows of each tar in a separate Parquet file until the index is written, so that stopped work continues."""

import hashlib
import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data.shards.dataset import ROWS_FOLDER, SCHEMA, write_atomically
from data.shards.tars import NUMBER, SampleRow, ShardRows, SkippedSample, TarTask
from data.storage.local import Version

COLUMNS = pa.schema([(name, "string" if name == "label" else SCHEMA.field(name).type) for name in SampleRow._fields])
FACTS = b"tar"  # key of the file's metadata


class SavedRows(NamedTuple):
    """All that is known of one tar but its rows, which `load` reads."""

    path: Path
    file: str
    samples: int
    bytes: int
    version: int | str
    sha256: str
    skipped: list[SkippedSample]
    colours: NDArray[np.float64]  # (7,)

    def load(self) -> pa.Table:
        """Read the rows, with labels as text. Raises: ValueError when the file is damaged."""
        try:
            return pq.ParquetFile(self.path, page_checksum_verification=True).read()
        except (pa.ArrowException, OSError) as error:
            raise _damaged(self.path) from error

    def key_of(self, label: str) -> str:
        """Return the key of the first sample with this label."""
        table = self.load()
        key: str = table.column("key")[table.column("label").to_pylist().index(label)].as_py()
        return key


@dataclass(frozen=True)
class SplitRows:
    """The tars of a split in the order of its index, and each label with the first tar that has it."""

    tars: list[SavedRows]
    labels: dict[str, SavedRows]

    @property
    def samples(self) -> int:
        """Number of images in the split."""
        return sum(tar.samples for tar in self.tars)

    @property
    def skipped(self) -> list[SkippedSample]:
        """The samples that no row stands for."""
        return [sample for tar in self.tars for sample in tar.skipped]


def is_number(label: str) -> bool:
    """Return whether a label is the number of a class, not its name."""
    return re.fullmatch(NUMBER, label) is not None


def rows_path(folder: Path, tar: TarTask, *, version: Version, label_field: str) -> Path:
    """Return the path of a tar's rows; it depends on all that decides them."""
    identity = json.dumps([*tar, *version, label_field])
    return folder / ROWS_FOLDER / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.parquet"


def saved_names(folder: Path) -> set[str]:
    """Return the names of the files of rows that are there."""
    rows = folder / ROWS_FOLDER
    return {path.name for path in rows.glob("[!.]*.parquet")} if rows.is_dir() else set()


def save_rows(folder: Path, tar: TarTask, *, shard: ShardRows, label_field: str) -> None:
    """Write the rows of a tar atomically. Raises: OSError."""
    columns = {name: [getattr(row, name) for row in shard.rows] for name in SampleRow._fields}
    columns["label"] = [str(label) for label in columns["label"]]
    facts = {
        "file": tar.file,
        "bytes": shard.bytes,
        "version": shard.version,
        "sha256": shard.sha256,
        "skipped": shard.skipped,
        "colours": shard.colours.tolist(),
        "labels": sorted(set(columns["label"])),
    }
    table = pa.table(columns, schema=COLUMNS.with_metadata({FACTS: json.dumps(facts)}))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    path = rows_path(folder, tar, version=Version(shard.bytes, shard.version), label_field=label_field)
    write_atomically(path, buffer.getvalue())


def read_split(paths: Iterable[Path]) -> SplitRows:
    """Read what is known of the tars of a split, but not their rows. Raises: ValueError for a damaged file."""
    tars: list[SavedRows] = []
    labels: dict[str, SavedRows] = {}
    for path in paths:
        try:
            metadata = pq.read_metadata(path)
            facts: dict[str, Any] = json.loads(metadata.metadata[FACTS])
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path) from error
        names = facts.pop("labels")
        facts["skipped"] = [SkippedSample(*sample) for sample in facts["skipped"]]
        facts["colours"] = np.asarray(facts["colours"])
        tars.append(SavedRows(path, samples=metadata.num_rows, **facts))
        for label in names:
            labels.setdefault(label, tars[-1])
    return SplitRows(tars, labels)


def _damaged(path: Path) -> ValueError:
    return ValueError(f"{path} is damaged: remove it to have its tar read again")
