"""`status.json`: the state of a run for schedulers and other programs, since launchers hide exit codes."""

import json
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from data.shards.dataset import write_atomically


class State(StrEnum):
    """What a run does, or how its last process ended. One that was killed stays in the state TRAINING, unlocked."""

    TRAINING = "training"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


def write_status(file: Path, state: State, *, step: int, reason: str = "", exit_code: int | None = None) -> None:
    """Write the state, the last optimizer step, and for one that has ended the reason and the exit code."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    status = {"state": state, "step": step, "reason": reason, "exit_code": exit_code, "time": now}
    write_atomically(file, json.dumps(status).encode() + b"\n")


def read_state(file: Path) -> State | None:
    """Return the state in the file, None without a readable one."""
    try:
        return State(json.loads(file.read_bytes())["state"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
