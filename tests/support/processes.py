"""Trainings as processes that are killed, signalled, or that fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from data.shards.dataset import Dataset
from tests.support.commands import TWO_RANKS
from tests.support.paths import ROOT

LIMIT = 240.0  # seconds after which a training that hangs is killed
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "pipeline.train")
ALONE = (sys.executable, "-m", "pipeline.train")


class Ended(NamedTuple):
    """How a training ended: exit code, output, and the state in its folder."""

    code: int
    stdout: str
    stderr: str
    status: dict[str, Any]


class Training:
    """A training in its own process group, with everything that it has started."""

    def __init__(self, root: Path, name: str, *words: str, launcher: tuple[str, ...] = ALONE, **variables: str) -> None:
        self.root, self.folder = root, root / "runs" / name
        self.stderr_file = root / f"{name}.stderr"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
        with self.stderr_file.open("w") as stderr:
            self.process = subprocess.Popen(
                [*launcher, *words, f"name={name}"],
                cwd=root,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        self._guard = threading.Timer(LIMIT, self.kill)
        self._guard.start()
        self._printed: list[str] = []
        self.started: list[psutil.Process] = []

    def wait_for(self, text: str) -> bool:
        """Wait until a line with a text is printed; return whether it was."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._printed.append(line)
            if text in line:
                with suppress(psutil.NoSuchProcess):
                    self.started = psutil.Process(self.process.pid).children(recursive=True)
                return True
        return False

    def rank(self, number: int) -> psutil.Process:
        """Return the process of a rank."""
        processes = [psutil.Process(self.process.pid), *self.started]
        verbs = [one for one in processes if "pipeline.train" in " ".join(one.cmdline()[:4])]
        if number == 0:
            return verbs[0]
        (found,) = [one for one in verbs if one.environ().get("LOCAL_RANK") == str(number)]
        return found

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to every process of the group."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """Kill every process of the group."""
        with suppress(ProcessLookupError):
            self.signal_group(signal.SIGKILL)

    def end(self) -> Ended:
        """Wait for the end, of everything that was started too."""
        assert self.process.stdout is not None
        self._printed.append(self.process.stdout.read())
        code = self.process.wait()
        _, alive = psutil.wait_procs(self.started, timeout=30)
        self._guard.cancel()
        for one in alive:
            one.kill()
        assert alive == [], "30 seconds later a process was still there"
        file = self.folder / "status.json"
        status = json.loads(file.read_text()) if file.is_file() else {}
        return Ended(code, "".join(self._printed), self.stderr_file.read_text(), status)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let processes of this block react to SIGINT, which background jobs of a shell ignore and pass on."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def train_undisturbed(folder: Path, dataset: Dataset, words: tuple[str, ...]) -> Path:
    """Copy a data set to where the config expects it, and train the run `complete` there; return the folder."""
    shutil.copytree(dataset.root, folder / "datasets" / dataset.name)
    ended = Training(folder, "complete", *words).end()
    assert ended.code == 0, ended
    return folder


def two_ranks(*words: str) -> tuple[str, ...]:
    """Return words of a training of two ranks over gloo."""
    return (*words, *TWO_RANKS)


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
