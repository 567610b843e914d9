"""A study that is signalled, or whose first failure ends it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from pipeline.runs.run import Run
from tests.support.commands import ran_steps
from tests.support.small_study import workflow

pytestmark = pytest.mark.engines


def test_without_keep_going_the_first_failure_is_the_last_step(project: Path) -> None:
    words = ("out=stops", "study.train.overrides=[+model=lenet,tracking=none,data.batch_size=100000]")
    first = workflow(project, *words, "keep_going=false")
    assert first.returncode == 1, first.stdout + first.stderr
    assert len(ran_steps(first)) == 2, "the packing and one training"
    assert (project / "work" / "stops" / "study.yaml").is_file()
    assert ran_steps(workflow(project, *words)) == ["train/bad!", "train/good!"]


def test_an_engine_that_is_signalled_at_any_moment_ends(project: Path) -> None:
    """Snakemake's own handler waits for a lock that the interrupted code may hold."""
    command = [sys.executable, "-m", "pipeline.workflow", "+study=two", "name=signalled", "~study.train.runs.bad"]
    environment = {**os.environ, "PYTHONPATH": str(project)}
    folder, end = project / "work" / "studies" / "signalled", time.monotonic() + 60
    with subprocess.Popen(command, cwd=project / "work", env=environment) as process:
        while not (folder / "logs" / "train" / "good.log").exists() and time.monotonic() < end:
            time.sleep(0.01)
        (engine,) = psutil.Process(process.pid).children()
        end = time.monotonic() + 60
        with suppress(psutil.NoSuchProcess):
            while time.monotonic() < end:  # also while it registers the end of the training
                engine.terminate()
                time.sleep(0.0002)
        process.wait(20)
    log = (folder / "snakemake.log").read_text()
    assert "Will exit after finishing currently running jobs" in log
    assert "RecursionError" not in log, "handlers that wait for each other"
    assert (folder / "done" / "train" / "good").exists()
    assert not (folder / "done" / "evaluate").exists(), "no step began after the signals"
    assert workflow(project, "name=signalled", "~study.train.runs.bad").returncode == 0


@pytest.mark.parametrize(("to", "number", "code"), [("the command", 15, 143), ("the engine", 9, 2)])
def test_a_signal_stops_the_training_and_the_same_command_continues_it(
    project: Path, to: str, number: int, code: int
) -> None:
    name = f"long{number}"
    long = (f"name={name}", "study.train.runs.good=[recipe.epochs=40]", "~study.train.runs.bad", "~study.compare")
    command = [sys.executable, "-m", "pipeline.workflow", "+study=two", *long]
    run = Run(project / "work" / "studies" / name / "runs" / "good")
    environment = {**os.environ, "PYTHONPATH": str(project)}
    with subprocess.Popen(command, cwd=project / "work", env=environment) as process:
        end = time.monotonic() + 120
        while run.last_checkpoint is None and time.monotonic() < end:
            time.sleep(0.1)
        (engine,) = psutil.Process(process.pid).children()
        (engine if to == "the engine" else process).send_signal(number)
        assert process.wait(20) == code
    end = time.monotonic() + 20
    while run.is_locked and time.monotonic() < end:
        time.sleep(0.1)
    status = json.loads(run.status_file.read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 143)
    assert status["step"] > 0
    answer = workflow(project, *long)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert ran_steps(answer) == ["evaluate/good/val", "export/good/weights", "train/good"]
    log = (run.folder.parents[1] / "logs" / "train" / "good.log").read_text()
    assert "stopped: the same command continues after step" in log
    assert f"(continues after step {status['step']})" in log
