"""Locks where the file system has no flock, between machines that do not see each other's processes."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data import locks
from tests.support.paths import ROOT
from tests.support.shards import make_samples, write_tar

OPEN = """
import errno, fcntl, sys, time
from pathlib import Path
from data import locks
from data.shards import indexing

def without_flock(*rest):
    raise OSError(errno.ENOSYS, "Function not implemented")

def slowly(*places, **options):
    print("begins", flush=True)
    time.sleep(1)
    made = index(*places, **options)
    print("ends", flush=True)
    return made

fcntl.flock, locks.LEASE_SECONDS = without_flock, 2.0
index, indexing._index_tars = indexing._index_tars, slowly
print(indexing.open_dataset(Path(sys.argv[1]))[0].splits["train"].digest)
"""
STARTS, SECONDS = 12, 90.0


def start(folder: Path, host: str) -> subprocess.Popen[str]:
    """Open the data set in a folder on a host with a name and a network of its own."""
    on_host = ["unshare", "--uts", "--net", "sh", "-c", 'hostname "$0" && exec "$@"', host]
    words = [*on_host, sys.executable, "-c", OPEN, str(folder)]
    return subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)


def holder_of(lease: Path, processes: list[subprocess.Popen[str]]) -> subprocess.Popen[str] | None:
    """Return the process that a lease names, None while there is none."""
    words = lease.read_text().split() if lease.is_file() else []
    return next((one for one in processes if f"pid={one.pid}" in words), None)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give processes a host name of their own")
@pytest.mark.parametrize("rounds", [pytest.param(1, marks=pytest.mark.faults), pytest.param(5, marks=pytest.mark.soak)])
def test_twelve_starts_on_two_hosts_without_flock_make_one_index(tmp_path: Path, rounds: int) -> None:
    for number in range(2 * rounds):
        is_killed, folder = number % 2 == 1, tmp_path / str(number)
        folder.mkdir()
        write_tar(folder / "train-0.tar", make_samples(4))
        processes = [start(folder, f"host{one % 2}") for one in range(STARTS)]
        if is_killed:
            end = time.monotonic() + SECONDS
            while (holder := holder_of(folder / ".lock", processes)) is None:
                assert time.monotonic() < end
                time.sleep(0.05)
            holder.kill()
        answers = [(one, one.communicate(timeout=SECONDS)[0].split()) for one in processes]
        finished = [words for one, words in answers if one.returncode == 0]
        assert len(finished) == STARTS - is_killed
        assert sum("ends" in words for words in finished) == 1, "one of them has made the index"
        assert len({words[-1] for words in finished}) == 1
        assert not list(folder.glob(".lock*"))


def test_a_lease_that_another_process_has_taken_ends_this_one(tmp_path: Path) -> None:
    code = """
import errno, fcntl, sys, time
from pathlib import Path
from data import locks

def without_flock(*rest):
    raise OSError(errno.ENOLCK, "No locks available")

fcntl.flock, locks.LEASE_SECONDS = without_flock, 0.6
path = Path(sys.argv[1])
with locks.file_lock(path, seconds=1):
    other = path.with_suffix(".other")
    other.write_text("that of another process")
    other.rename(path)
    time.sleep(10)
print("not ended")
"""
    path = tmp_path / "lock"
    words = [sys.executable, "-c", code, str(path)]
    answer = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr == f"error: the lock {path} is lost (owner-changed)\n"


def test_a_lease_names_process_machine_and_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*rest: object) -> None:
        raise OSError(errno.ENOSYS, "no")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.3)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    path = tmp_path / "lock"
    holder = f"process {os.getpid()} on {socket.gethostname()}, job 4711"
    with locks.file_lock(path, seconds=1):
        assert locks.lock_holder(path) == holder
        with (
            pytest.raises(TimeoutError, match=f"^{re.escape(f'{path} is locked by {holder}')}$"),
            locks.file_lock(path, seconds=0),
        ):
            raise AssertionError("two processes hold one lease")
    assert not list(tmp_path.iterdir()), "nothing stays of a lease that was given back"


@pytest.mark.parametrize("reason", [None, errno.ENOSYS, errno.ENOLCK])
def test_a_lock_that_is_held_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int | None) -> None:
    def refuse(*rest: object) -> None:
        raise OSError(reason, "no")

    if reason is not None:
        monkeypatch.setattr(fcntl, "flock", refuse)
    path = tmp_path / "lock"
    assert not locks.is_file_locked(path)
    with locks.file_lock(path, seconds=1):
        assert locks.is_file_locked(path)
    assert not locks.is_file_locked(path)
