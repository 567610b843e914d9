"""Access to the bytes of shards by position; tars on a local or shared disk."""

import os
from collections.abc import Sequence
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

OPEN_SHARDS = 256  # a quarter of the usual limit of open files
READ_SECONDS = 600.0  # limit for the reading of a batch; storage that takes longer does not answer

Read = TypeVar("Read")


class Request(NamedTuple):
    """Bytes to read: those of `file` from `offset` on fill `into`."""

    file: str
    offset: int
    into: NDArray[np.uint8]


class Version(NamedTuple):
    """Size of a tar in bytes, and what changes with its content: modification time in nanoseconds, or ETag.

    An object without an ETag has its modification time as text.
    """

    size: int
    tag: int | str


class Storage(Protocol):
    """Reads bytes of shards by position. Called from several threads."""

    def read_batch(self, requests: Sequence[Request]) -> None:
        """Fill the arrays of all requests. Raises: ValueError, OSError naming the file."""

    def expect(self, files: Sequence[str]) -> None:
        """Prepare for the shards that will be read next, in this order; they replace those of the last call."""


class LocalShards:
    """Tars in a folder, read by position: a tar that shrinks raises an error, where a memory map kills the process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._open = lru_cache(maxsize=OPEN_SHARDS)(lambda file: _OpenFile(root / file))

    def read_batch(self, requests: Sequence[Request]) -> None:
        """Fill the arrays of all requests. Raises: ValueError when a file is too short; OSError."""
        for file, offset, into in requests:
            shard = self._open(file)  # keeps it open while the cache may evict it
            if not fill(shard.descriptor, offset, into=into):
                end = offset + len(into)
                raise ValueError(f"{self.root / file} ends before byte {end}: it changed after it was indexed")

    def expect(self, files: Sequence[str]) -> None:
        """Nothing: a local file needs no preparation."""


def read_bytes(storage: Storage, file: str, *, offset: int, size: int) -> bytes:
    """Read one part of a shard. Raises: ValueError, OSError."""
    into = np.empty(size, np.uint8)
    storage.read_batch([Request(file, offset, into)])
    return into.tobytes()


def fill(descriptor: int, offset: int, *, into: NDArray[np.uint8]) -> bool:
    """Read the bytes of an open file from `offset` on; return False when it ends too early."""
    done = 0
    while done < len(into):  # a network file system may return fewer bytes than requested
        count = os.preadv(descriptor, [into[done:].data], offset + done)
        if count == 0:
            return False
        done += count
    return True


def write_all(descriptor: int, content: memoryview) -> None:
    """Append to an open file. Raises: OSError."""
    while content:  # a write may be incomplete
        content = content[os.write(descriptor, content) :]


def wait_for(reading: Future[Read]) -> Read:
    """Return what a thread reads. Raises: TimeoutError after READ_SECONDS, and what the reading raises."""
    try:
        return reading.result(READ_SECONDS)
    except TimeoutError as error:
        if reading.done():  # the storage's own
            raise
        raise TimeoutError(f"the storage of the data has not answered in {READ_SECONDS:.0f} seconds") from error


class _OpenFile:
    """A file descriptor that closes with its last reference, so that the cache may evict it at any time."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
