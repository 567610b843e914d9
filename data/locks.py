"""Locks on files that processes of several machines may share; each ends with its process."""

import errno
import fcntl
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

from filelock import BaseFileLock, FileLock, LeaseCompromise, SoftFileLease, Timeout

LEASE_SECONDS = 60.0  # without a sign of life after which the lock of another machine is taken over
EXPIRED_SECONDS = 300.0  # the same, where only the clocks of two machines can be compared
FAILURE = 2  # exit code
NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def file_lock(path: Path, *, seconds: float) -> Iterator[None]:
    """Hold the lock `path`, whose folder must exist.

    Where the file system has no flock it is a lease, which its process renews, with a file beside it that names
    process, machine and job. One that has not been renewed for LEASE_SECONDS is taken over, and a process that finds
    its own taken ends at once.
    Raises: TimeoutError, which names the holder of a lease, when others hold it for `seconds`, in which a lease may
    expire in addition; OSError.
    """
    lock = _lock(path)
    is_lease, holder_file = isinstance(lock, SoftFileLease), _holder_file(path)
    with ExitStack() as stack:
        try:
            stack.enter_context(lock.acquire(timeout=seconds + 1.5 * LEASE_SECONDS * is_lease))
        except Timeout:
            raise TimeoutError(f"{path} is locked by {lock_holder(path)}") from None
        if is_lease:
            holder_file.write_text(this_process())
            stack.callback(holder_file.unlink, missing_ok=True)
        yield


def this_process() -> str:
    """Return process, machine and job of Slurm in words."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"process {os.getpid()} on {socket.gethostname()}" + (f", job {job}" if job else "")


def lock_holder(path: Path) -> str:
    """Return the process that holds a lease in words, without its name for another lock."""
    try:
        return _holder_file(path).read_text() or "another process"  # one that has just created it
    except (OSError, UnicodeDecodeError):
        return "another process"


def _holder_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.holder")


def is_file_locked(path: Path) -> bool:
    """Return whether a process holds the lock; False where this user may not try. An expired lease does not count."""
    try:
        lock = _lock(path)
        with lock.acquire(timeout=0):
            return False
    except Timeout:
        try:
            return not isinstance(lock, SoftFileLease) or time.time() - path.stat().st_mtime < EXPIRED_SECONDS
        except FileNotFoundError:  # released meanwhile
            return False
    except OSError:
        return False


def _lock(path: Path) -> BaseFileLock:
    if _has_flock(path):
        return FileLock(path, fallback_to_soft=False)
    return SoftFileLease(path, lease_duration=LEASE_SECONDS, on_compromise=_end)


def _has_flock(path: Path) -> bool:
    with tempfile.TemporaryFile(dir=path.parent) as probe:
        try:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_FLOCK:
                return False
            raise
    return True


def _end(lost: LeaseCompromise) -> NoReturn:
    """End the process before it changes what another one may have begun to change."""
    print(f"error: the lock {lost.lock_file} is lost ({lost.reason})", file=sys.stderr, flush=True)
    os._exit(FAILURE)
