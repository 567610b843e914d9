"""Access to the bytes of shards: local disk today, object stores later."""

import os
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

OPEN_SHARDS = 256  # a quarter of the usual limit of open files
READ_SECONDS = 600.0  # limit for the reading of a batch; storage that takes longer does not answer

Read = TypeVar("Read")


class Storage(Protocol):
    """Reads bytes of shards by position. Called from several threads."""

    def read(self, file: str, into: NDArray[np.uint8], *, offset: int) -> None:
        """Fill `into` with the bytes from `offset` on. Raises: ValueError, OSError naming the file."""


class LocalShards:
    """Tars in a folder, read by position: a tar that shrinks raises an error, where a memory map kills the process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._open = lru_cache(maxsize=OPEN_SHARDS)(lambda file: _OpenFile(root / file))

    def read(self, file: str, into: NDArray[np.uint8], *, offset: int) -> None:
        """Fill `into` with the bytes from `offset` on. Raises: ValueError when the file is too short."""
        shard = self._open(file)  # keeps it open while the cache may evict it
        done = 0
        while done < len(into):  # a network file system may return fewer bytes than requested
            count = os.preadv(shard.descriptor, [into[done:].data], offset + done)
            if count == 0:
                end = offset + len(into)
                raise ValueError(f"{self.root / file} ends before byte {end}: it changed after it was indexed")
            done += count


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
