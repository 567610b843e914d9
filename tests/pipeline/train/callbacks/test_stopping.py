"""Several ranks end together, whichever of them gets the signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch

from tests.support.commands import TWO_RANKS, journal
from tests.support.paths import ROOT


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_ends_both(with_digits: Path, rank: int) -> None:
    words = ("+model=lenet", *TWO_RANKS, "tracking=none", "name=two", "recipe.epochs=400", "data.batch_size=32")
    command = [sys.executable, "-m", "pipeline.train", *words, "log_every=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=with_digits, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        guard = threading.Timer(120, process.kill)  # ranks that wait for each other
        guard.start()
        assert any("step 30/" in line for line in process.stdout), "it ended before it could be stopped"
        children = [one for one in psutil.Process(process.pid).children() if one.environ().get("LOCAL_RANK") == "1"]
        assert len(children) == 1
        (children[0] if rank else process).send_signal(signal.SIGTERM)
        printed = process.stdout.read()
        assert process.wait(timeout=60) == 143
        guard.cancel()
    assert "stopped: the same command continues after step" in printed
    psutil.wait_procs(children, timeout=20)
    assert not children[0].is_running()
    run = with_digits / "runs" / "two"
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    stopped = journal(run)[-1]["step"]
    assert last <= stopped < 400 * 22


def test_a_signal_before_the_first_step_leaves_no_process(with_digits: Path) -> None:
    command = [sys.executable, "-m", "pipeline.train", "+model=lenet", *TWO_RANKS, "tracking=none", "name=early"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=with_digits, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line.startswith("dashboard") for line in process.stdout), "it ended before its header"
        while not (ranks := psutil.Process(process.pid).children()):
            assert process.poll() is None
        process.terminate()
        process.wait(timeout=60)
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert alive == []
