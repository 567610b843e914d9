"""Tars in an object store (S3, Google Cloud Storage, Azure) or on a web server, through obstore."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np
import obstore
from obstore.store import HTTPStore, from_url

from data.arguments import ArgumentError, require
from data.storage.errors import CHANGED, explain, explained
from data.storage.local import Request, Version, wait_for
from data.storage.location import Url, join

if TYPE_CHECKING:  # stubs only
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

INFLIGHT = 64  # requests at once: 930 a second at 20 ms of latency
PART = 16 * 2**20  # bytes of a request for an entire object
OPENING_RETRIES, RETRIES = 3, 10
# A request that is retried ends after four minutes, before the loader's limit.
REQUEST_SECONDS, CONNECT_SECONDS, RETRY_SECONDS = 60, 10, 180


class RemoteShards:
    """Objects below a URL, read by position with `inflight` requests at once.

    Threads are faster than an event loop: 10,600 requests of 100 KB a second against 9,800 (benchmarks/README.md).
    Raises: ArgumentError for a URL that the library refuses.
    """

    def __init__(self, root: Url, *, inflight: int = INFLIGHT, retries: int = RETRIES) -> None:
        require(inflight >= 1, "must be an integer of at least 1", inflight=inflight)
        self.root, self._store = root, _connect(root, retries=retries)
        self._threads = ThreadPoolExecutor(inflight, thread_name_prefix="object-reader")

    def read_batch(self, requests: Sequence[Request]) -> None:
        """Fill the arrays of all requests. Raises: ValueError when an object is too short; OSError."""
        reading = [self._threads.submit(self._read, request) for request in requests]
        try:
            for one in reading:
                wait_for(one)
        finally:
            for one in reading:
                one.cancel()

    def expect(self, files: Sequence[str]) -> None:
        """Nothing: an object is read when it is needed."""

    @property
    def can_list(self) -> bool:
        """Whether the store lists its objects; a web server does not."""
        return not isinstance(self._store, HTTPStore)

    def list_tars(self) -> dict[str, Version]:
        """Return all tars below the URL. Raises: ArgumentError when they cannot be listed."""
        try:
            found = [one for chunk in obstore.list(self._store, chunk_size=1000) for one in chunk]
        except Exception as error:  # whatever it is, nothing can be read
            raise ArgumentError(("root", self.root), f" {explain(error, self.root)[1]}") from error
        return {one["path"]: _version(one) for one in found if one["path"].endswith(".tar")}

    def versions(self, files: Iterable[str]) -> dict[str, Version]:
        """Return the versions of tars, by one listing where the store has that. Raises: FileNotFoundError, OSError."""
        files = list(files)
        if self.can_list:
            found = self.list_tars()
            missing = next((file for file in files if file not in found), None)
            if missing is not None:
                raise FileNotFoundError(f"{join(self.root, missing)} does not exist")
            return {file: found[file] for file in files}
        return dict(zip(files, self._threads.map(self.version, files), strict=True))

    def version(self, file: str) -> Version:
        """Return the version of an object. Raises: FileNotFoundError, OSError."""
        with explained(join(self.root, file)):
            return _version(obstore.head(self._store, file))

    def read(self, file: str) -> bytes | None:
        """Return a small object, None where it does not exist. Raises: OSError."""
        try:
            with explained(join(self.root, file)):
                return obstore.get(self._store, file).bytes().to_bytes()
        except FileNotFoundError:
            return None

    def parts(self, file: str, version: Version) -> Iterator[memoryview]:
        """Yield an entire object in parts. Raises: ValueError when it does not have this version; OSError."""
        url = join(self.root, file)
        for start in range(0, version.size, PART):
            end = min(start + PART, version.size)
            with explained(url):
                result = obstore.get(self._store, file, options={"range": (start, end)})
                content = memoryview(result.bytes())
                is_same = _version(result.meta) == version and len(content) == end - start
            if not is_same:
                raise ValueError(f"{url} {CHANGED}")
            yield content

    def _read(self, request: Request) -> None:
        file, offset, into = request
        with explained(join(self.root, file)):
            content = obstore.get_range(self._store, file, start=offset, length=len(into))
        if len(content) != len(into):  # a range past the end is no error
            end = f"{join(self.root, file)} ends before byte {offset + len(into)}"
            raise ValueError(f"{end}: it changed after it was indexed")
        into[:] = np.frombuffer(memoryview(content), np.uint8)


def _connect(root: Url, *, retries: int) -> ObjectStore:
    allows_http = root.scheme == "http" or os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("true", "1")
    client: ClientConfig = {
        "allow_http": allows_http,
        "timeout": timedelta(seconds=REQUEST_SECONDS),
        "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
    }
    retry: RetryConfig = {"max_retries": retries, "retry_timeout": timedelta(seconds=RETRY_SECONDS)}
    try:
        return from_url(str(root), client_options=client, retry_config=retry)
    except Exception as error:  # the library has no common base for what it refuses
        raise ArgumentError(("root", root), f" {explain(error, root)[1]}") from error


def _version(meta: ObjectMeta) -> Version:
    tag = meta["e_tag"] or meta["last_modified"].isoformat()
    return Version(meta["size"], tag.strip('"'))  # listings of some stores have no quotes
