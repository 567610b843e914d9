"""Reads one WebDataset tar, ours or foreign: its samples, their labels, and the position and size of their images."""

import hashlib
import json
import re
import tarfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.shards import images
from data.shards.members import JoinedTars, read_members
from data.storage.location import Root, join
from data.storage.tars import open_tar

NUMBER = r"[+-]?\d+"  # a label that is a number
RESERVED = re.compile(r"__[^/]*__($|/)")  # names that WebDataset reserves and skips
# Height and width of an encoded image: `images.intact_size`, or `oriented_size` where each was decoded before.
SizeOf = Callable[[bytes], tuple[int, int]]
Place = tuple[int, int]  # offset and size of a file in a tar, in bytes


class SkippedSample(NamedTuple):
    """A sample that is not in the index, and the reason."""

    name: str
    reason: str
    lacks_label_field: bool = False  # another `label_field` may read it


class MissingLabelField(ValueError):
    """The .json of a sample lacks the label field."""


class TarTask(NamedTuple):
    """A tar to read, and the number of its images to decode for the colour statistics."""

    file: str
    statistics_images: int


class SampleRow(NamedTuple):
    """A row of the index, with the label as it is in the tar."""

    key: str
    offset: int
    size: int
    label: int | str
    height: int
    width: int


@dataclass
class ShardRows:
    """The rows of one tar, the samples it skipped, and the sums of `images.colour_sums`."""

    file: str
    bytes: int = 0
    version: int | str = 0  # modification time in nanoseconds, or ETag, before it was read
    sha256: str = ""
    rows: list[SampleRow] = field(default_factory=list)
    skipped: list[SkippedSample] = field(default_factory=list)
    colours: NDArray[np.float64] = field(default_factory=lambda: np.zeros(7))


def read_shard(
    root: Root, task: TarTask, *, label_field: str, size_of: SizeOf, scratch: Path | None = None
) -> ShardRows:
    """Read one tar; one in an object store by way of a temporary file in `scratch`.

    Raises: ValueError when it is cut short, joined with another, or not a tar; OSError.
    """
    path, shard = join(root, task.file), ShardRows(task.file)
    with open_tar(root, task.file, scratch=scratch) as (stream, shard.version):
        shard.sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        shard.bytes = stream.tell()
        try:
            samples, repeated = _list_samples(stream)
        except JoinedTars as error:
            raise ValueError(f"{path}: {error}") from error
        except tarfile.TarError as error:
            raise ValueError(f"{path} is damaged or cut short ({error}): copy or pack it again") from error
        last = max((place for files in samples.values() for place in files.values()), default=(0, 0))
        for key, files in samples.items():
            try:
                shard.rows.append(_read_row(stream, key, files=files, label_field=label_field, size_of=size_of))
            except ValueError as error:
                if last in files.values() and _bytes_at(stream, last).endswith(b"\0"):  # where an incomplete copy ends
                    problem = f"its last file, of {key}, ends in zeros: {error}"
                    raise ValueError(f"{path} is damaged or cut short ({problem}): copy or pack it again") from error
                lacks_label_field = isinstance(error, MissingLabelField)
                shard.skipped.append(SkippedSample(f"{path}: {key}", str(error), lacks_label_field))
        reason = "a second file of this name: the first is used"
        shard.skipped += [SkippedSample(f"{path}: {name}", reason) for name in repeated]
        for row in shard.rows[: task.statistics_images]:
            with suppress(images.UnreadableImage):  # its header is intact; the loader names it when it decodes it
                shard.colours += images.colour_sums(_bytes_at(stream, (row.offset, row.size)))
    return shard


def _list_samples(stream: BinaryIO) -> tuple[dict[str, dict[str, Place]], list[str]]:
    """List the files of a tar by sample key (up to the first dot of the name) and lower-case suffix; repeated names."""
    samples: dict[str, dict[str, Place]] = {}
    repeated = []
    for member in read_members(stream):
        folder, slash, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        if not member.isfile() or not stem or RESERVED.match(member.name):
            continue
        files = samples.setdefault(folder + slash + stem, {})
        if suffix.lower() in files:
            repeated.append(member.name)
        files.setdefault(suffix.lower(), (member.offset_data, member.size))
    return samples, repeated


def _read_row(stream: BinaryIO, key: str, *, files: dict[str, Place], label_field: str, size_of: SizeOf) -> SampleRow:
    image = next((files[suffix] for suffix in images.SUFFIXES if suffix in files), None)
    if image is None:
        raise ValueError(f"no {', '.join(images.SUFFIXES)} file")
    if "cls" in files:
        text = _bytes_at(stream, files["cls"]).decode(errors="replace").strip()
    elif "json" in files:
        text = _json_label(_bytes_at(stream, files["json"]), label_field)
    else:
        raise ValueError("no label: neither a .cls nor a .json file")
    if "\0" in text:
        raise ValueError("its label has bytes of zeros")
    label = int(text) if re.fullmatch(NUMBER, text) else text
    height, width = size_of(_bytes_at(stream, image))
    return SampleRow(key, *image, label, height, width)


def _json_label(text: bytes, label_field: str) -> str:
    try:
        fields = json.loads(text)
    except RecursionError as error:
        raise ValueError("its .json is nested too deeply") from error
    if not isinstance(fields, dict) or label_field not in fields:
        content = ", ".join(fields) if isinstance(fields, dict) else type(fields).__name__
        raise MissingLabelField(f"its .json has no field {label_field}: {content}")
    label = fields[label_field]
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise ValueError(f"its label {json.dumps(label)} is neither an integer nor a name")
    return str(label).strip()


def _bytes_at(stream: BinaryIO, place: Place) -> bytes:
    offset, size = place
    stream.seek(offset)
    return stream.read(size)
