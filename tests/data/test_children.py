"""Processes end with the one that has started them, however that ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data import children
from data.children import PARENT, TORCHRUN, end_with_me, end_with_parent

CHILD = "import time; from data.children import end_with_parent as end; end(); print('ready', flush=True); {}"
PARENT_OF = """
import subprocess, sys, os, time
from data.children import end_with_me
asked = {"TORCHELASTIC_RUN_ID": "none"} if sys.argv[2] == "torchrun" else end_with_me()
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env={**os.environ, **asked}, stdout=sys.stdout)
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("parent_is", ["us", "torchrun"])
def test_a_killed_process_takes_its_child_along(parent_is: str) -> None:
    command = [sys.executable, "-c", PARENT_OF, CHILD.format("time.sleep(60)"), parent_is]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        lines = sorted([parent.stdout.readline(), parent.stdout.readline()])
        assert lines[1] == "ready\n"
        child = psutil.Process(int(lines[0]))
        parent.kill()
    gone, alive = psutil.wait_procs([child], timeout=10)
    assert (len(gone), alive) == (1, [])


def test_a_process_whose_parent_has_ended_does_not_start() -> None:
    environment = {**os.environ, PARENT: "1"}
    ended = subprocess.run(
        [sys.executable, "-c", CHILD.format("")], env=environment, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "process 1, which started this one, has ended\n"


def test_without_a_request_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (PARENT, TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(children.ctypes, "CDLL", lambda name: pytest.fail("the kernel was asked"))
    end_with_parent()
    assert end_with_me() == {PARENT: str(os.getpid())}


def test_a_killed_training_leaves_no_probe(tmp_path: Path) -> None:
    """The process that tries decoders is asked to end with the training that waits for it."""
    program = (
        "import sys; from data.loading import probe;"
        "probe.COMMAND = (sys.executable, '-c', sys.argv[1]); probe.pickle.dumps = lambda probes: b'';"
        "probe.try_decoder()"
    )
    pid_file = tmp_path / "pid"
    waiting = f"import os, pathlib; pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program, CHILD.format(waiting)]) as training:
        while not (pid_file.is_file() and pid_file.read_text()):
            assert training.poll() is None
            time.sleep(0.02)
        child = psutil.Process(int(pid_file.read_text()))
        training.terminate()
    assert psutil.wait_procs([child], timeout=10)[1] == []
