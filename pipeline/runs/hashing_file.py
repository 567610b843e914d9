"""A file that is written past the page cache, with its SHA-256."""

import errno
import fcntl
import hashlib
import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import Self

BUFFER_BYTES = 1 << 20


class HashingFile:
    """A new file for a program that only writes and flushes; it is on the disk when it is closed.

    Direct writes spare the processor a copy, and the page cache a content that nobody is about to read. A file system
    without them gets ordinary ones.
    """

    def __init__(self, path: Path) -> None:
        """Raises: OSError."""
        self.sha256, self.bytes = hashlib.sha256(), 0
        self._buffer = memoryview(mmap.mmap(-1, BUFFER_BYTES))  # aligned to a page, as direct writes need
        self._filled, self._path = 0, path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        with suppress(OSError):  # tmpfs, for one, has none
            self._set_direct(True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        try:
            if error is None:
                self._set_direct(False)  # the rest is not of a disk's block size
                self._write_buffer()
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def write(self, content: bytes) -> int:
        """Write, and add to the digest. Raises: OSError, naming the file."""
        rest = memoryview(content)
        while rest:
            piece = rest[: BUFFER_BYTES - self._filled]
            self.sha256.update(piece)  # before the copy, which then reads from the processor's cache
            self._buffer[self._filled : self._filled + len(piece)] = piece
            self._filled, rest = self._filled + len(piece), rest[len(piece) :]
            if self._filled == BUFFER_BYTES:
                self._write_buffer()
        return len(content)

    def flush(self) -> None:
        """Do nothing: closing flushes."""

    def _write_buffer(self) -> None:
        rest = self._buffer[: self._filled]
        self.bytes += len(rest)
        while rest:
            rest = rest[self._write(rest) :]
        self._filled = 0

    def _write(self, content: memoryview) -> int:
        try:
            return os.write(self._descriptor, content)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise OSError(error.errno, error.strerror, str(self._path)) from error
            self._set_direct(False)  # a file system may take the flag and refuse the write
            return os.write(self._descriptor, content)

    def _set_direct(self, direct: bool) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT)
