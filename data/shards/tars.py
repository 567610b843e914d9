"""One WebDataset tar, ours or anybody's: which samples it holds, where their images lie, and what they are.

A tar is read once: its SHA-256, each image's place, size in pixels and label, and
the colours of its first images.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.shards import images

METADATA = re.compile(r"__[^/]*__($|/)")  # names that WebDataset keeps for itself, and passes over


class LeftOut(NamedTuple):
    """A sample that is not in the index, and why."""

    name: str
    reason: str


# Height and width of an encoded image; raises UnreadableImage.
SizeOf = Callable[[bytes], tuple[int, int]]


class Member(NamedTuple):
    """Where a file lies in a tar, in bytes."""

    offset: int
    size: int


@dataclass
class ShardRows:
    """What one tar holds: a list a column of the index, and sums of colours as `images.colour_sums` gives them."""

    file: str
    bytes: int = 0
    modified_ns: int = 0  # before it was read
    sha256: str = ""
    columns: dict[str, list[int]] = field(
        default_factory=lambda: {name: [] for name in ("offset", "size", "height", "width")}
    )
    labels: list[int | str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    colours: NDArray[np.float64] = field(default_factory=lambda: np.zeros(7))


def read_shard(root: Path, file: str, *, label_field: str, statistics_images: int, size_of: SizeOf) -> ShardRows:
    """Read one tar; `statistics_images` of its images are decoded for their colours.

    `size_of` is `images.whole_size`, or `images.oriented_size` where every image has
    been decoded before.

    Raises: ValueError when it is cut short or no tar.
    """
    shard = ShardRows(file)
    with open(root / file, "rb") as stream:
        shard.modified_ns = os.fstat(stream.fileno()).st_mtime_ns
        shard.sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        shard.bytes = stream.tell()
        try:
            samples, repeated = list_samples(stream)
        except tarfile.TarError as error:
            raise ValueError(f"{root / file} is damaged or cut short ({error}): copy or pack it again") from error
        for key, files in samples.items():
            try:
                _append_row(shard, key, row=_read_row(stream, files, label_field=label_field, size_of=size_of))
            except ValueError as error:
                shard.left_out.append(LeftOut(f"{root / file}: {key}", str(error)))
        again = "a second file of this name: the first is used"
        shard.left_out += [LeftOut(f"{root / file}: {name}", again) for name in repeated]
        places = list(zip(shard.columns["offset"], shard.columns["size"], strict=True))
        shard.colours = _colours(stream, [Member(*place) for place in places[:statistics_images]])
    return shard


def list_samples(stream: BinaryIO) -> tuple[dict[str, dict[str, Member]], list[str]]:
    """The files of a tar by sample key and lower-case suffix; a key ends at the first dot of the file's name.

    Also returns the names that come a second time.

    Raises: tarfile.TarError when the tar does not end as a tar ends.
    """
    samples: dict[str, dict[str, Member]] = {}
    repeated = []
    stream.seek(0)
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            folder, slash, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            if not member.isfile() or not stem or METADATA.match(member.name):
                continue
            files = samples.setdefault(folder + slash + stem, {})
            if suffix.lower() in files:
                repeated.append(member.name)
            files.setdefault(suffix.lower(), Member(member.offset_data, member.size))
        stream.seek(tar.offset)
    # A tar ends in blocks of zeros. Python takes one that was cut between two files, or goes on as garbage, for whole.
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("no end-of-archive mark after the last whole file")
    return samples, repeated


class _Row(NamedTuple):
    image: Member
    height: int
    width: int
    label: int | str


def _read_row(stream: BinaryIO, files: dict[str, Member], *, label_field: str, size_of: SizeOf) -> _Row:
    image = next((files[suffix] for suffix in images.SUFFIXES if suffix in files), None)
    if image is None:
        raise ValueError(f"no {', '.join(images.SUFFIXES)} file")
    label = _label(stream, files, label_field=label_field)
    height, width = size_of(_bytes_at(stream, image))
    return _Row(image, height, width, label)


def _append_row(shard: ShardRows, key: str, *, row: _Row) -> None:
    columns = {"offset": row.image.offset, "size": row.image.size, "height": row.height, "width": row.width}
    for name, value in columns.items():
        shard.columns[name].append(value)
    shard.labels.append(row.label)
    shard.keys.append(key)


def _label(stream: BinaryIO, files: dict[str, Member], *, label_field: str) -> int | str:
    if "cls" in files:
        label = _bytes_at(stream, files["cls"]).decode(errors="replace").strip()
    elif "json" in files:
        fields = json.loads(_bytes_at(stream, files["json"]))
        if not isinstance(fields, dict) or label_field not in fields:
            found = ", ".join(fields) if isinstance(fields, dict) else type(fields).__name__
            raise ValueError(f"its .json has no field {label_field} (data.label_field=NAME names another): {found}")
        found = fields[label_field]
        if isinstance(found, bool) or not isinstance(found, int | str):
            raise ValueError(f"its label {json.dumps(found)} is neither a whole number nor a name")
        label = str(found).strip()
    else:
        raise ValueError("no label: neither a .cls nor a .json file")
    return int(label) if re.fullmatch(r"[+-]?\d+", label) else label


def _colours(stream: BinaryIO, places: list[Member]) -> NDArray[np.float64]:
    total = np.zeros(7)
    for place in places:
        try:
            total += images.colour_sums(_bytes_at(stream, place))
        except images.UnreadableImage:
            continue  # its header was right; the loader names it if it is ever asked for
    return total


def _bytes_at(stream: BinaryIO, member: Member) -> bytes:
    stream.seek(member.offset)
    return stream.read(member.size)
