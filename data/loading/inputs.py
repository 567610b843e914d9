"""Images that a user points to: a file, a folder, a pattern, tars, a packed data set, or a list of paths."""

import glob
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.arguments import require
from data.shards.dataset import Dataset
from data.shards.images import SUFFIXES
from data.shards.members import JoinedTars, read_members
from data.storage.local import read_bytes
from data.storage.location import URL, join
from data.storage.open import open_storage

STANDARD_INPUT = "-"


class Source(NamedTuple):
    """An image that has not been read yet. `read` raises OSError or ValueError."""

    name: str
    read: Callable[[], bytes]


def find_images(text: str, *, lines: Iterable[str]) -> Iterator[Source]:
    """Yield the images that `text` means, sorted by path; `-` means the paths in `lines`, one a line.

    Images in tars are named TAR/MEMBER; a damaged tar is itself a source that cannot be read.
    Raises: ArgumentError for a path that does not exist or holds no image.
    """
    require(bool(text), "is empty: give a file, a folder or a pattern", input=text)
    require(URL.match(text) is None, "is a URL: give images on this machine", input=text)
    if text == STANDARD_INPUT:
        return map(file_source, filter(None, (line.rstrip("\r\n") for line in lines)))
    path = Path(text)
    if path.is_file():
        return _of_file(path)
    if path.is_dir():
        found = sorted(one for one in path.rglob("*") if _is_image(one.name) or one.suffix == ".tar")
    else:
        found = sorted(map(Path, glob.glob(text, recursive=True)))
        found = [one for one in found if one.is_file() or one.is_symlink()]
        rule = "matches nothing" if glob.has_magic(text) else "does not exist"
        require(bool(found), rule, input=text)
    require(bool(found), f"has no image: {', '.join(SUFFIXES)}, or tars of them", input=text)
    return (source for one in found if one.is_file() or one.is_symlink() for source in _of_file(one))


def count_ignored_files(folder: Path) -> Counter[str]:
    """Count the files that `find_images` leaves out, by suffix; none where this is not a folder."""
    files = (one for one in folder.rglob("*") if one.is_file()) if folder.is_dir() else ()
    return Counter(
        one.suffix.lower() or "suffixless" for one in files if not _is_image(one.name) and one.suffix != ".tar"
    )


def split_sources(dataset: Dataset, split: str, *, limit: int | None = None) -> list[tuple[Source, int]]:
    """Return the images of a packed split with their labels; `limit` of them are spread evenly over the split.

    Raises: ValueError when the data set has no such split.
    """
    index = dataset.index(split)
    count = len(index) if limit is None else min(limit, len(index))
    samples = np.linspace(0, len(index) - 1, count).round().astype(np.int64)
    rows, storage = index.rows(samples), open_storage(dataset.root, dataset.shard_bytes)
    sources = []
    for shard, offset, size, label in zip(rows.shard, rows.offset, rows.size, rows.label, strict=True):
        file = index.split.shards[shard].file
        read = partial(read_bytes, storage, file, offset=int(offset), size=int(size))
        sources.append((Source(f"{join(dataset.root, file)}@{offset}", read), int(label)))
    return sources


def _of_file(path: Path) -> Iterator[Source]:
    return _of_tar(path) if path.suffix == ".tar" else iter([file_source(path)])


def file_source(path: str | Path) -> Source:
    """Return an image file that has not been read yet."""
    return Source(_escape_path(path), Path(path).read_bytes)


def _escape_path(path: str | Path) -> str:
    """A path with escapes for bytes that are no text."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _of_tar(path: Path) -> Iterator[Source]:
    try:
        with path.open("rb") as stream:
            for member in read_members(stream):
                if member.isfile() and _is_image(member.name):
                    read = partial(_read_part, path, offset=member.offset_data, size=member.size)
                    yield Source(_escape_path(f"{path}/{member.name}"), read)
    except OSError as error:
        yield Source(_escape_path(path), partial(_raise, error))
    except JoinedTars as error:
        yield Source(_escape_path(path), partial(_raise, ValueError(str(error))))
    except tarfile.TarError as error:
        yield Source(_escape_path(path), partial(_raise, ValueError(f"the tar is damaged, or compressed: {error}")))


def _raise(error: OSError | ValueError) -> bytes:
    raise error


def _read_part(path: Path, *, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        read = os.pread(file.fileno(), size, offset)
    if len(read) < size:
        raise ValueError(f"{path} ends before byte {offset + size}")
    return read


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in SUFFIXES
