"""Processes that do not outlive the one that has started them."""

import ctypes
import os
import signal
import sys

PARENT = "CONVOY_PARENT"  # environment variable: the process with which those that it starts end
TORCHRUN = "TORCHELASTIC_RUN_ID"  # which it gives to its processes
PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with_me() -> dict[str, str]:
    """Return the environment for a process that calls `end_with_parent`."""
    return {PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Let the kernel send SIGTERM when the parent has ended, however it ended.

    The parent is the process that gave this one the environment of `end_with_me`, or torchrun; without either, and on
    other systems than Linux, nothing happens. A process without a handler ends; the rank of a training saves first.
    Raises: SystemExit if the parent has ended already.
    """
    parent = os.environ.pop(PARENT, str(os.getppid()) if TORCHRUN in os.environ else None)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        raise SystemExit(f"process {parent}, which started this one, has ended")
