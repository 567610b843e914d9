"""The cache of shards: its bound, what it keeps, and that no kill and no full disk damages it."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from data.shards.dataset import Dataset
from data.storage.cache import CacheFolder, NoRoom
from data.storage.cached import CachedShards
from data.storage.local import Request
from data.storage.location import Url
from data.storage.open import StorageSettings, open_storage
from data.storage.remote import RemoteShards
from tests.support.paths import ROOT
from tests.support.stores import S3

FILL = """
import random, sys
import numpy as np
from pathlib import Path
from data.storage.local import Request
from data.storage.location import Url
from data.storage.open import StorageSettings, open_storage

url, folder, limit, seed, *names = sys.argv[1:]
sizes = {name.partition(":")[0]: int(name.partition(":")[2]) for name in names}
storage = open_storage(Url(url), sizes, settings=StorageSettings(4, Path(folder), float(limit)))
print("open", flush=True)
order = random.Random(int(seed))
while True:
    for file in order.sample(sorted(sizes), len(sizes)):
        storage.read_batch([Request(file, 0, np.empty(sizes[file], np.uint8))])
"""


def content_of(name: str, size: int) -> bytes:
    return random.Random(name).randbytes(size)


def taken(folder: Path) -> int:
    """Return the bytes of all files, while nobody changes them."""
    with FileLock(folder / ".lock"):
        return sum(path.stat().st_size for path in folder.iterdir())


def put(cache: CacheFolder, name: str, size: int, *, keep: frozenset[str] = frozenset()) -> NoRoom | None:
    """Fill a shard in two parts."""
    with cache.reserve(name, size, keep=keep) as descriptor:
        if isinstance(descriptor, NoRoom):
            return descriptor
        content = content_of(name, size)
        for part in (content[: size // 2], content[size // 2 :]):
            assert taken(cache.folder) <= cache.limit
            os.write(descriptor, part)
    return None


def read(cache: CacheFolder, name: str) -> bytes | None:
    descriptor = cache.open(name)
    if descriptor is None:
        return None
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def wait_until_cached(folder: Path, count: int) -> None:
    for _ in range(2000):
        if len(list(folder.glob("*.shard"))) == count:
            return
        time.sleep(0.005)
    pytest.fail(f"{len(list(folder.glob('*.shard')))} of {count} shards were downloaded")


def wait_until_idle(storage: CachedShards) -> None:
    for _ in range(2000):
        if not storage._queue and not storage._busy:
            return
        time.sleep(0.005)
    pytest.fail("a shard is still being downloaded")


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=8),
    order=st.lists(st.integers(0, 7), min_size=1, max_size=24),
    limit=st.integers(1, 6000),
    threads=st.integers(1, 4),
)
def test_the_cache_is_never_over_its_bound(sizes: list[int], order: list[int], limit: int, threads: int) -> None:
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(threads) as pool:
        cache = CacheFolder(Path(folder), limit)

        def use(number: int) -> None:
            name, size = f"{number % len(sizes)}.shard", sizes[number % len(sizes)]
            content = read(cache, name)
            assert content in (None, content_of(name, size))
            if content is None:
                full = put(cache, name, size) is NoRoom.FULL
                assert not full or size > limit or threads > 1
            assert taken(cache.folder) <= limit

        for done in [pool.submit(use, number) for number in order]:
            done.result()
        assert not list(cache.folder.glob("*.partial"))


def test_the_least_recently_used_shard_leaves(tmp_path: Path) -> None:
    cache = CacheFolder(tmp_path, 300)
    names = ["a.shard", "b.shard", "c.shard"]
    for number, name in enumerate(names):
        put(cache, name, 100)
        os.utime(tmp_path / name, ns=(number, number))
    assert read(cache, "a.shard") == content_of("a.shard", 100)
    assert put(cache, "d.shard", 100) is None
    assert [name for name in (*names, "d.shard") if read(cache, name)] == ["a.shard", "c.shard", "d.shard"]
    assert put(cache, "e.shard", 100, keep=frozenset({"a.shard", "c.shard", "d.shard"})) is NoRoom.FULL
    assert put(cache, "f.shard", 301) is NoRoom.FULL
    assert put(cache, "a.shard", 100) is NoRoom.ELSEWHERE


def test_a_shard_that_is_removed_while_it_is_read_stays_readable(tmp_path: Path) -> None:
    cache = CacheFolder(tmp_path, 100)
    put(cache, "a.shard", 100)
    descriptor = cache.open("a.shard")
    assert descriptor is not None
    put(cache, "b.shard", 100)
    with os.fdopen(descriptor, "rb") as file:
        assert file.read() == content_of("a.shard", 100)
    assert read(cache, "a.shard") is None


def test_a_failed_download_leaves_nothing(tmp_path: Path) -> None:
    cache = CacheFolder(tmp_path, 100)

    def fail() -> None:
        with cache.reserve("a.shard", 100, keep=()):
            raise TimeoutError

    with pytest.raises(TimeoutError):
        fail()
    assert taken(tmp_path) == 0


def reading(remote: str, folder: Path, dataset: Dataset, *, limit: int | None = None) -> CachedShards:
    settings = StorageSettings(8, folder, (limit or 10**9) / 1e9)
    storage = open_storage(Url(remote), dataset.shard_bytes, settings=settings)
    assert isinstance(storage, CachedShards)
    return storage


def read_shards(storage: CachedShards, dataset: Dataset, *files: str) -> dict[str, bytes]:
    requests = [Request(file, 0, np.empty(dataset.shard_bytes[file], np.uint8)) for file in files]
    storage.read_batch(requests)
    return {one.file: one.into.tobytes() for one in requests}


def local(dataset: Dataset, *files: str) -> dict[str, bytes]:
    return {file: (dataset.root / file).read_bytes() for file in files}


def test_reads_are_right_before_and_after_a_shard_is_cached(
    tmp_path: Path, remote: str, photographs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, storage = sorted(photographs.shard_bytes), reading(remote, tmp_path, photographs)
    assert read_shards(storage, photographs, *files) == local(photographs, *files)
    wait_until_cached(tmp_path, len(files))
    monkeypatch.setattr(RemoteShards, "read_batch", lambda *_: pytest.fail("read from the store"))
    assert read_shards(storage, photographs, *files) == local(photographs, *files)
    storage.close()


def test_expected_shards_are_downloaded_in_advance_and_kept(tmp_path: Path, remote: str, photographs: Dataset) -> None:
    sizes = photographs.shard_bytes
    *others, first, second = sorted(sizes, key=sizes.__getitem__)
    storage = reading(remote, tmp_path, photographs, limit=sizes[first] + sizes[second])
    storage.expect([first, second])
    wait_until_cached(tmp_path, 2)
    kept = {path.name for path in tmp_path.glob("*.shard")}
    assert read_shards(storage, photographs, *others) == local(photographs, *others)
    wait_until_idle(storage)
    assert {path.name for path in tmp_path.glob("*.shard")} == kept
    storage.expect([others[0]])
    wait_until_idle(storage)
    assert {path.name for path in tmp_path.glob("*.shard")} - kept, "the next window's shard was not downloaded"
    storage.close()


def test_ranks_download_each_shard_once(
    tmp_path: Path, remote: str, photographs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads: list[str] = []
    parts = RemoteShards.parts

    def counted(self: RemoteShards, file: str, version: object) -> Iterator[memoryview]:
        downloads.append(file)
        return parts(self, file, version)

    monkeypatch.setattr(RemoteShards, "parts", counted)
    files = sorted(photographs.shard_bytes)
    ranks = [reading(remote, tmp_path, photographs) for _ in range(2)]
    for rank in ranks:
        rank.expect(files)
    wait_until_cached(tmp_path, len(files))
    for rank in ranks:
        rank.close()
    assert sorted(downloads) == files


def test_a_damaged_shard_is_replaced(tmp_path: Path, remote: str, photographs: Dataset) -> None:
    (file, *_), storage = sorted(photographs.shard_bytes), reading(remote, tmp_path, photographs)
    storage.expect([file])
    wait_until_cached(tmp_path, 1)
    (path,) = tmp_path.glob("*.shard")
    os.truncate(path, 1000)
    assert read_shards(storage, photographs, file) == local(photographs, file)
    wait_until_cached(tmp_path, 1)
    assert path.read_bytes() == (photographs.root / file).read_bytes()
    storage.close()


def test_an_object_that_changes_is_never_cached(tmp_path: Path, s3: S3, bucket: str, photographs: Dataset) -> None:
    remote = s3.upload(photographs.root, bucket)
    (file, *_), storage = sorted(photographs.shard_bytes), reading(remote, tmp_path, photographs)
    s3.put(bucket, f"data/{file}", bytes(photographs.shard_bytes[file]))
    storage.expect([file])
    for thread in storage._threads[:1]:
        thread.join(timeout=30)
    with pytest.raises(ValueError, match=f"{remote}/{file} changed after it was indexed: start again"):
        read_shards(storage, photographs, file)
    storage.close()
    assert not list(tmp_path.glob("*.shard"))


@pytest.mark.faults
def test_twenty_kills_leave_the_cache_sound(tmp_path: Path, remote: str, photographs: Dataset) -> None:
    folder, sizes = tmp_path / "cache", photographs.shard_bytes
    limit = sum(sizes.values()) // 2
    names = {path.name: path.read_bytes() for path in _cached_under_their_names(remote, tmp_path / "all", photographs)}
    delays, partials, complete = random.Random(0), 0, 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for kill in range(20):
        words = [remote, str(folder), str(limit / 1e9), str(kill), *(f"{name}:{size}" for name, size in sizes.items())]
        with subprocess.Popen([sys.executable, "-c", FILL, *words], env=environment, stdout=subprocess.PIPE) as filling:
            assert filling.stdout is not None
            assert filling.stdout.readline() == b"open\n"
            time.sleep(delays.uniform(0, 0.2))
            filling.send_signal(signal.SIGKILL)
        assert taken(folder) <= limit
        partials += len(list(folder.glob("*.partial")))
        shards = {path.name: path.read_bytes() for path in folder.glob("*.shard")}
        assert all(names[name] == content for name, content in shards.items())
        complete += len(shards)
    assert partials > 0, "no kill came during a download"
    assert complete > 0, "no kill came after a download"
    CacheFolder(folder, limit)
    assert not list(folder.glob("*.partial"))


def _cached_under_their_names(remote: str, folder: Path, dataset: Dataset) -> list[Path]:
    storage = reading(remote, folder, dataset)
    storage.expect(sorted(dataset.shard_bytes))
    wait_until_cached(folder, len(dataset.shard_bytes))
    storage.close()
    return list(folder.glob("*.shard"))


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Mount a file system of `size` bytes in memory."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_an_error_at_the_start(tmp_path: Path, remote: str, photographs: Dataset) -> None:
    with small_disk(tmp_path / "disk", 2**16) as disk:
        sentence = f"^folder={disk} has .* GB of disk for .* GB of shards: free some, or lower gigabytes=1$"
        with pytest.raises(ValueError, match=sentence):
            reading(remote, disk, photographs)


def test_a_disk_that_fills_is_an_error_that_names_the_cache(tmp_path: Path, remote: str, photographs: Dataset) -> None:
    with small_disk(tmp_path / "disk", 2 * sum(photographs.shard_bytes.values())) as disk:
        storage = reading(remote, disk, photographs)
        with (disk / "other").open("wb") as file:
            free = os.statvfs(disk)
            file.write(bytes(free.f_bavail * free.f_bsize - 8192))
        storage.expect(sorted(photographs.shard_bytes))
        for thread in storage._threads:
            thread.join(timeout=30)
        with pytest.raises(OSError, match=f"the disk of the cache {disk} is full: .*data.cache_gb") as error:
            read_shards(storage, photographs, *photographs.shard_bytes)
        assert error.value.errno == errno.ENOSPC
        assert not list(disk.glob("*.partial"))
