"""The tars of a folder or an object store: their list, and each as a file to index."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BufferedRandom, BufferedReader
from pathlib import Path

from data.storage.local import Version
from data.storage.location import Root, Url
from data.storage.remote import OPENING_RETRIES, RemoteShards

TAR_SUFFIX = ".tar"


def list_tars(root: Path) -> dict[str, Version]:
    """Return the tars below a folder, sorted by path; hidden ones are left out."""
    found = {}
    for path in sorted(root.rglob(f"*{TAR_SUFFIX}")):
        file = path.relative_to(root)
        if not any(part.startswith(".") for part in file.parts):
            stat = path.stat()
            found[file.as_posix()] = Version(stat.st_size, stat.st_mtime_ns)
    return found


@contextmanager
def open_tar(
    root: Root, file: str, *, scratch: Path | None = None
) -> Iterator[tuple[BufferedReader | BufferedRandom, int | str]]:
    """Open a tar for reading, and return its version. An object becomes a temporary file without a name in `scratch`.

    Raises: ValueError when an object changes meanwhile; OSError.
    """
    if not isinstance(root, Url):
        with (root / file).open("rb") as stream:
            yield stream, os.fstat(stream.fileno()).st_mtime_ns
        return
    shards = _shards(root)
    version = shards.version(file)
    with tempfile.TemporaryFile(dir=scratch) as copy:
        for part in shards.parts(file, version):
            copy.write(part)
        yield copy, version.tag


@lru_cache(maxsize=1)
def _shards(root: Url) -> RemoteShards:
    return RemoteShards(root, retries=OPENING_RETRIES)
