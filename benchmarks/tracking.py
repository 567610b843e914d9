"""What a server that fails costs a training: the same training beside one that is dead, hangs, dies or returns.

    python -m benchmarks.tracking          ResNet-18 on digits, 132 steps, 5 interleaved rounds, 15 minutes

A real `mlflow server` on the same cores. Each training is a command of its own: "start" is the time from the command to
the point of step 10, "training" that from there to the last point, "CPU" the processor's time of the command.
"More" is to a training without tracking in the same round; a "ratio" compares the fastest trainings, or the least CPU
time.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.runs.run import Run

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("+model=resnet", "trainer=cpu", "log_every=10")
PORT = 5599
URI = f"http://127.0.0.1:{PORT}"
CHANGE_STEP = 60  # where the server dies or returns


class Cost(NamedTuple):
    """Seconds of one training."""

    start: float
    training: float
    cpu: float


def environment() -> dict[str, str]:
    """The environment of all commands."""
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return {**os.environ, **quiet, "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}


@contextmanager
def server(folder: Path) -> Iterator[int]:
    """Run a server that answers; yield its process group."""
    words = ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--port", str(PORT), "--workers", "1"]
    command = [sys.executable, "-m", "mlflow", "server", *words, "--artifacts-destination", str(folder / "artifacts")]
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(), stdout=log, stderr=log, start_new_session=True
        )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end and process.poll() is None:
            with suppress(OSError):
                direct.open(f"{URI}/health", timeout=5).close()
                break
            time.sleep(0.2)
        time.sleep(3)  # until its processes are idle
        yield process.pid
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def train(folder: Path, name: str, *, tracking: bool, change: tuple[int, signal.Signals] | None = None) -> Cost:
    """Train once; send a signal to a process group at CHANGE_STEP."""
    where = f"tracking.uri={URI}" if tracking else "tracking=none"
    command = [sys.executable, "-m", "pipeline.train", *WORDS, where, f"name={name}"]
    run, start = Run(folder / "runs" / name), time.time()
    process = subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while change is not None and process.poll() is None:
        time.sleep(0.1)
        if any(point.step >= CHANGE_STEP for point in run.journal.points()):
            os.killpg(*change)
            break
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, name
    times = [point.time for point in run.journal.points() if point.step >= 10]
    return Cost(times[0] - start, times[-1] - times[0], usage.ru_utime + usage.ru_stime)


def train_beside(folder: Path, state: str) -> Cost:
    """Train beside a server in one of STATES."""
    name = f"{state}-{time.time_ns()}"
    if state in ("none", "dead"):
        return train(folder, name, tracking=state == "dead")
    with server(folder) as group:
        if state in ("hangs", "returns"):
            os.killpg(group, signal.SIGSTOP)
        changes = {"dies": signal.SIGKILL, "returns": signal.SIGCONT}
        change = (group, changes[state]) if state in changes else None
        return train(folder, name, tracking=True, change=change)


STATES = ("none", "answers", "dead", "hangs", "dies", "returns")


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train_beside(folder, "none")  # writes the digits, and fills the page cache
        rounds = []
        for turn in range(options.rounds):
            order = STATES if turn % 2 == 0 else STATES[::-1]
            rounds.append({state: train_beside(folder, state) for state in order})
            print(turn + 1, rounds[-1], file=sys.stderr, flush=True)
    print("| server | start s | more | training s | fastest | ratio | CPU s | least | ratio |\n|---|" + 8 * "--:|")
    for state in STATES:
        costs, without = ([one[which] for one in rounds] for which in (state, "none"))
        start, training, cpu = (statistics.median(values) for values in zip(*costs, strict=True))
        more = statistics.median(mine.start - its.start for mine, its in zip(costs, without, strict=True))
        fastest, least = (min(values) for values in list(zip(*costs, strict=True))[1:])
        slower, costlier = fastest / min(one.training for one in without), least / min(one.cpu for one in without)
        print(
            f"| {state} | {start:.1f} | {more:+.1f} | {training:.2f} | {fastest:.2f} | {slower:.3f} "
            f"| {cpu:.1f} | {least:.1f} | {costlier:.3f} |"
        )


if __name__ == "__main__":
    main()
