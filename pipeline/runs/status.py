"""`status.json`: the state of a run for schedulers and other programs, since launchers hide exit codes."""

import json
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from data.locks import this_process
from data.shards.dataset import write_atomically


class State(StrEnum):
    """What a run does, or how its last process ended. One that was killed stays in the state TRAINING, unlocked."""

    TRAINING = "training"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


def write_status(file: Path, state: State, *, step: int, reason: str = "", exit_code: int | None = None) -> None:
    """Write the state, the last step, the reason and exit code of one that has ended, and this process."""
    status = {
        **{"state": state, "step": step, "reason": reason, "exit_code": exit_code},
        **{"time": datetime.now(UTC).isoformat(timespec="seconds"), "process": this_process()},
    }
    write_atomically(file, json.dumps(status).encode() + b"\n")


def read_state(file: Path) -> State | None:
    """Return the state in the file, None without a readable one."""
    try:
        return State(str(_read(file, "state")))
    except ValueError:
        return None


def read_process(file: Path) -> str | None:
    """Return the process, its machine and its job of Slurm, None without a readable file."""
    process = _read(file, "process")
    return process if isinstance(process, str) else None


def _read(file: Path, key: str) -> object:
    try:
        return json.loads(file.read_bytes())[key]
    except (OSError, ValueError, TypeError, KeyError):
        return None
