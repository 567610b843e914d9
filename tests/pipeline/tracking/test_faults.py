"""Trainings beside a real server that is dead, hangs, dies and returns: `make test-all`, in a minute."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.runs.run import Run
from tests.support.commands import run_module
from tests.support.paths import ROOT
from tests.support.tracked import Server, journal_points, page_points, pages

pytestmark = pytest.mark.faults

# 8 epochs of 22 steps.
WORDS = ("+model=lenet", "recipe.epochs=8", "data.batch_size=64", "log_every=5", "+trainer.limit_val_batches=1")
DIRECT = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server that does not run yet."""
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def training(root: Path, name: str, *, uri: str) -> Iterator[subprocess.Popen[str]]:
    """Start a training; its lines are in `stdout`."""
    command = [sys.executable, "-u", "-m", "pipeline.train", *WORDS, f"name={name}"]
    environment = {**os.environ, **DIRECT, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": uri}
    with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Return what a process prints up to the first line with a text."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError("".join(lines))


def rest_of(process: subprocess.Popen[str]) -> str:
    """Return what a process prints until its end."""
    assert process.stdout is not None
    return process.stdout.read()


def check_pages(server: Server, runs: Path) -> dict[str, str]:
    """Return the status of each page; none is FINISHED without all points, and no point is there twice."""
    found = {}
    for page in pages(server.database):
        run = Run(runs / page.info.run_name)
        points, expected = page_points(server.database, page.info.run_id), journal_points(run)
        for key, curve in points.items():
            assert curve == expected[key][: len(curve)], (run.name, key)
        assert points == expected or page.info.status != "FINISHED", run.name
        assert run.name not in found, "a run has two pages"
        found[run.name] = page.info.status
    return found


def sync(root: Path, server: Server) -> list[str]:
    """Run `sync` for all runs, and return its lines."""
    answer = run_module(root, "pipeline.sync", MLFLOW_TRACKING_URI=server.uri, **DIRECT)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout.splitlines()


def test_a_server_that_is_dead_at_the_start_and_returns_has_everything(with_digits: Path, server: Server) -> None:
    with training(with_digits, "dead", uri=server.uri) as process:
        begun = read_until(process, "epoch 1/8")
        assert f"MLflow at {server.uri} failed: " in begun
        assert "dashboard   none" in begun
        printed = rest_of(process)
        assert process.wait() == 0, printed
    assert "python -m pipeline.sync runs/dead sends the rest" in printed
    with training(with_digits, "returns", uri=server.uri) as process:
        read_until(process, "epoch 1/8")
        server.start()
        printed = rest_of(process)
        assert process.wait() == 0, printed
    check_pages(server, with_digits / "runs")
    assert [line.endswith("; complete") for line in sync(with_digits, server)] == [True, True]
    assert check_pages(server, with_digits / "runs") == {"dead": "FINISHED", "returns": "FINISHED"}


def test_a_server_that_hangs_and_dies_loses_and_doubles_nothing(with_digits: Path, server: Server) -> None:
    server.start()
    server.signal(signal.SIGSTOP)
    with training(with_digits, "hung", uri=server.uri) as process:  # from the start, and again before the end
        assert f"MLflow at {server.uri} has not answered yet" in read_until(process, "epoch 2/8")
        server.signal(signal.SIGCONT)
        read_until(process, "epoch 6/8")
        server.signal(signal.SIGSTOP)
        printed = rest_of(process)
        assert process.wait() == 0, printed
    with training(with_digits, "stopped", uri=server.uri) as process:
        read_until(process, "epoch 1/8")
        process.send_signal(signal.SIGTERM)
        printed = rest_of(process)
        assert process.wait() == 143, printed
        assert "python -m pipeline.sync runs/stopped sends the rest" in printed
    server.signal(signal.SIGCONT)
    with training(with_digits, "killed", uri=server.uri) as process:
        read_until(process, "epoch 2/8")
        server.kill()
        read_until(process, "epoch 3/8")
        server.start()
        printed = rest_of(process)
        assert process.wait() == 0, printed
    check_pages(server, with_digits / "runs")
    sync(with_digits, server)
    ends = {"hung": "FINISHED", "stopped": "KILLED", "killed": "FINISHED"}
    assert check_pages(server, with_digits / "runs") == ends
    for page in pages(server.database):
        run = Run(with_digits / "runs" / page.info.run_name)
        assert page_points(server.database, page.info.run_id) == journal_points(run)
    assert all("sent 0 points, 0 files; complete" in line for line in sync(with_digits, server))
