"""Shards of an object store with a cache on local disk: shards that will be read are downloaded in advance."""

import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from data.storage.cache import CacheFolder, NoRoom, shard_name
from data.storage.local import Request, Version, fill, write_all
from data.storage.location import join
from data.storage.remote import RemoteShards

DOWNLOADS = 4  # shards that are downloaded at the same time
SECONDS_UNTIL_NEXT_TRY = 1.0  # for a shard that another process downloads
POLL_SECONDS = 0.2  # between checks whether the process ends


class CachedShards:
    """Read shards from a cache, and directly from the store while they are not there.

    A shard is downloaded when `expect` names it or a read misses it, unless that would remove shards that `expect`
    has named: if these exceed the cache, the rest is read directly, and nothing is downloaded twice.

    Threads: callers and DOWNLOADS threads, which end with the main thread. `_changed` guards all fields that change,
    but `_keep` and `_error`, references that are also read without it. `_names` and `_versions` are constant.
    """

    def __init__(self, shards: RemoteShards, cache: CacheFolder, *, versions: Mapping[str, Version]) -> None:
        self._shards, self._cache, self._versions = shards, cache, versions
        self._names = {file: shard_name(join(shards.root, file), version) for file, version in versions.items()}
        self._changed = threading.Condition()
        self._queue: dict[str, None] = {}  # in the order of their download
        self._busy: set[str] = set()
        self._not_before: dict[str, float] = {}  # when to try again to download a shard
        self._keep: frozenset[str] = frozenset()  # names of shards that are expected
        self._error: Exception | None = None
        self._threads: list[threading.Thread] = []
        self._is_closed = False

    def read_batch(self, requests: Sequence[Request]) -> None:
        """Fill the arrays of all requests. Raises: ValueError, OSError, those of downloads too."""
        missed = [request for request in requests if not self._read_cached(request)]
        if self._error is not None:
            raise self._error
        if missed:
            self._enqueue(dict.fromkeys(request.file for request in missed))
            self._shards.read_batch(missed)

    def expect(self, files: Sequence[str]) -> None:
        """Download these shards first, in this order, and do not remove them."""
        with self._changed:
            self._keep = frozenset(self._names[file] for file in files)
            self._not_before.clear()
            self._queue.clear()
        self._enqueue(dict.fromkeys(file for file in files if not self._is_cached(file)))

    def close(self) -> None:
        """Stop downloading; the shards that are being downloaded are given up."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _is_cached(self, file: str) -> bool:
        return Path(self._cache.folder, self._names[file]).exists()

    def _read_cached(self, request: Request) -> bool:
        name = self._names[request.file]
        # Opened for each read: a shard that is removed would take disk space for as long as it is open.
        descriptor = self._cache.open(name)
        if descriptor is None:
            return False
        try:
            is_read = fill(descriptor, request.offset, into=request.into)
            size = os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
        if not is_read and size != self._versions[request.file].size:
            self._cache.remove(name)
        return is_read

    def _enqueue(self, files: Mapping[str, None]) -> None:
        now = time.monotonic()
        with self._changed:
            for file in files:
                if file not in self._busy and file not in self._queue and self._not_before.get(file, 0) <= now:
                    self._queue[file] = None
            if self._queue and not self._threads:
                self._threads = [threading.Thread(target=self._download_all) for _ in range(DOWNLOADS)]
                for thread in self._threads:
                    thread.start()
            self._changed.notify_all()

    def _download_all(self) -> None:
        while (file := self._next_file()) is not None:
            failure = None
            try:
                not_before = self._download(file)
            except _EndedError:
                return
            except Exception as error:  # noqa: BLE001  # raised by the next read
                not_before, failure = float("inf"), error
            with self._changed:
                self._busy.discard(file)
                self._not_before[file] = not_before
                self._error = self._error or failure

    def _next_file(self) -> str | None:
        """Wait for a shard to download; None when the process ends."""
        with self._changed:
            while not self._queue:
                if self._ends():
                    return None
                self._changed.wait(POLL_SECONDS)
            if self._ends():
                return None
            file = next(iter(self._queue))
            del self._queue[file]
            self._busy.add(file)
            return file

    def _ends(self) -> bool:
        return self._is_closed or self._error is not None or not threading.main_thread().is_alive()

    def _download(self, file: str) -> float:
        """Download a shard; return when to try again if it is missed."""
        version = self._versions[file]
        with self._cache.reserve(self._names[file], version.size, keep=self._keep) as descriptor:
            if descriptor is NoRoom.FULL:
                return float("inf")
            if descriptor is NoRoom.ELSEWHERE:
                return time.monotonic() + SECONDS_UNTIL_NEXT_TRY
            for part in self._shards.parts(file, version):
                if self._ends():
                    raise _EndedError(file)
                write_all(descriptor, part)
        return 0.0


class _EndedError(Exception):
    """The process ends while a shard is being downloaded."""
