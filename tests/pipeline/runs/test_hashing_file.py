"""Files written past the page cache: their bytes and digests, whatever their length and file system."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from pathlib import Path

import pytest

from pipeline.runs import hashing_file
from pipeline.runs.hashing_file import BUFFER_BYTES, HashingFile


def write(path: Path, content: bytes, pieces: random.Random) -> HashingFile:
    with HashingFile(path) as file:
        while content:
            taken = pieces.choice((1, 4096, 100_003, BUFFER_BYTES, 2 * BUFFER_BYTES + 1))
            assert file.write(content[:taken]) == len(content[:taken])
            content = content[taken:]
    return file


@pytest.mark.parametrize("folder", ["", "/dev/shm"])
@pytest.mark.parametrize("length", [0, 1, 4096, BUFFER_BYTES - 1, BUFFER_BYTES, 3 * BUFFER_BYTES + 5])
def test_a_file_has_its_bytes_and_their_digest(folder: str, length: int, tmp_path: Path) -> None:
    content = random.Random(length).randbytes(length)
    path = Path(folder or tmp_path) / f"convoy-{os.getpid()}-{length}"
    try:
        path.write_bytes(b"older and longer" * 300_000)
        file = write(path, content, random.Random(0))
        assert path.read_bytes() == content
        assert (file.bytes, file.sha256.hexdigest()) == (length, hashlib.sha256(content).hexdigest())
    finally:
        path.unlink(missing_ok=True)


def test_a_file_system_may_refuse_direct_writes_and_take_only_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As file systems in user space do, which take the flag but not the write."""
    asked, real = list[int](), os.write

    def refusing(descriptor: int, content: memoryview) -> int:
        asked.append(len(content))
        if len(asked) == 2:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, content[: 8192 if len(asked) == 3 else None])

    monkeypatch.setattr(hashing_file.os, "write", refusing)
    content = random.Random(0).randbytes(3 * BUFFER_BYTES + 7)
    file = write(tmp_path / "file", content, random.Random(1))
    assert (tmp_path / "file").read_bytes() == content
    assert file.sha256.hexdigest() == hashlib.sha256(content).hexdigest()
    assert asked == [BUFFER_BYTES] * 3 + [BUFFER_BYTES - 8192, BUFFER_BYTES, 7]
