"""A folder of downloaded shards with a bound in bytes, shared by the processes of a machine.

A shard is named by a digest of its URL and version, so one that has changed is another shard. It is downloaded into a
file `NAME.partial`, which has its full size from the start and is renamed when it is complete: the sizes of all files
are what the folder takes, whoever is killed at any time. The process that downloads holds an flock on its partial file,
which ends with the process; a partial file without one is removed. Space is reserved, and files are renamed and
removed, only under the lock of the folder.
"""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto
from pathlib import Path

from filelock import FileLock

from data.arguments import ArgumentError, require
from data.storage.local import Version

SUFFIX, PARTIAL, LOCK = ".shard", ".partial", ".lock"
LOCK_SECONDS = 600.0  # it is held for milliseconds
GIGABYTE = 10**9


class NoRoom(Enum):
    """The reason why a shard cannot be downloaded now."""

    FULL = auto()  # of shards that are still needed
    ELSEWHERE = auto()  # another process or thread downloads it


def shard_name(url: str, version: Version) -> str:
    """Return the file name of one version of a shard."""
    identity = f"{url}\0{version.tag}\0{version.size}"
    return hashlib.sha256(identity.encode()).hexdigest()[:32] + SUFFIX


class CacheFolder:
    """Complete shards, of which the least recently used are removed so that all files together fit into `limit` bytes.

    Without state besides its files: any number of threads and processes may use it.
    Raises: ArgumentError when the folder cannot be written to.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._remove_abandoned()
        except OSError as error:
            raise ArgumentError(("folder", folder), f" cannot be used: {error}") from error

    def open(self, name: str) -> int | None:
        """Return a file descriptor of a complete shard, which counts as used now; None when it is not there."""
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        with suppress(PermissionError):  # of another user's file, which may be read
            os.utime(descriptor)
        return descriptor

    def check_space(self, needed: int) -> None:
        """Raise ArgumentError unless the disk can hold the cache, or `needed` bytes of shards if these are fewer."""
        with self._locked():
            free = shutil.disk_usage(self.folder).free + sum(size for _, size, _ in self._files())
        wanted = min(needed, self.limit)
        rule = f" has {free / GIGABYTE:.3g} GB of disk for {wanted / GIGABYTE:.3g} GB of shards: free some, or lower "
        if free < wanted:
            raise ArgumentError(("folder", self.folder), rule, ("gigabytes", f"{self.limit / GIGABYTE:g}"))

    @contextmanager
    def reserve(self, name: str, size: int, *, keep: Collection[str]) -> Iterator[int | NoRoom]:
        """Yield the descriptor of a file of `size` bytes to be filled, or the reason why there is none.

        It becomes the shard `name` when the block ends without an error. Shards in `keep` are not removed for it.
        Raises: OSError when the disk is full.
        """
        partial = self.folder / f"{name}{PARTIAL}"
        found = self._begin(name, size, keep=keep)
        if isinstance(found, NoRoom):
            yield found
            return
        try:
            yield found
            os.fsync(found)  # a rename that survives a power cut must not survive its content
            with self._locked():
                partial.rename(self.folder / name)
        except BaseException:
            with self._locked():
                partial.unlink(missing_ok=True)
            raise
        finally:
            os.close(found)

    def remove(self, name: str) -> None:
        """Remove a shard that is damaged."""
        with self._locked():
            (self.folder / name).unlink(missing_ok=True)

    def _begin(self, name: str, size: int, *, keep: Collection[str]) -> int | NoRoom:
        with self._locked():
            self._remove_abandoned()
            partial = self.folder / f"{name}{PARTIAL}"
            if partial.exists() or (self.folder / name).exists():
                return NoRoom.ELSEWHERE
            if not self._make_room(size, keep=keep):
                return NoRoom.FULL
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if size:
                    os.posix_fallocate(descriptor, 0, size)
            except OSError as error:
                os.close(descriptor)
                partial.unlink()
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    advice = f"the disk of the cache {self.folder} is full: free some, or lower data.cache_gb"
                    raise OSError(error.errno, advice) from error
                raise
            return descriptor

    def _make_room(self, size: int, *, keep: Collection[str]) -> bool:
        """Remove the least recently used shards until `size` more bytes fit; return False when they cannot."""
        files = self._files()
        excess = sum(one for _, one, _ in files) + size - self.limit
        removable = sorted(
            (used, one, path) for path, one, used in files if path.suffix == SUFFIX and path.name not in keep
        )
        if excess > sum(one for _, one, _ in removable):
            return False
        for _, one, path in removable:
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= one
        return True

    def _files(self) -> list[tuple[Path, int, int]]:
        """List path, size and time of use in nanoseconds of every shard, complete or not."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith((SUFFIX, PARTIAL)):
                    stat = entry.stat()
                    found.append((Path(entry.path), stat.st_size, stat.st_mtime_ns))
        return found

    def _remove_abandoned(self) -> None:
        """Remove the partial files of processes that have ended."""
        for path in self.folder.glob(f"*{PARTIAL}"):
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            else:
                path.unlink()
            finally:
                os.close(descriptor)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with FileLock(self.folder / LOCK, timeout=LOCK_SECONDS, fallback_to_soft=False):
            yield


def bytes_of(gigabytes: float) -> int:
    """Return a bound in bytes. Raises: ArgumentError unless it is a positive number."""
    is_number = isinstance(gigabytes, int | float) and not isinstance(gigabytes, bool)
    require(is_number and 0 < gigabytes < float("inf"), "must be a positive number", gigabytes=gigabytes)
    return int(gigabytes * GIGABYTE)
