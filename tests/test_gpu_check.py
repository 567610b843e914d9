"""`make gpu-check` as a program: on a CPU, and with checks that fail, crash or hang."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import checks
from benchmarks.gpu.checks import Answer, Check, Result, run_apart, table
from tests.support.commands import run_module
from tests.support.paths import ROOT


@pytest.mark.faults
def test_checks_run_on_a_cpu() -> None:
    answer = run_module(ROOT, "benchmarks.gpu", "--device", "cpu", "--only", "versions", "graphs", "memory")
    assert answer.returncode == 0, answer.stderr
    lines = [json.loads(line) for line in answer.stdout.splitlines() if line.startswith("{")]
    assert [(line["check"], line["holds"]) for line in lines] == [("versions", None), ("graphs", True)]
    assert lines[0]["figures"]["torch"] == torch.__version__.partition("+")[0]
    assert "| graphs | yes |" in answer.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_one_sentence_says_what_to_type() -> None:
    answer = run_module(ROOT, "benchmarks.gpu")
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: there is no GPU")
    assert answer.stderr.endswith(": make gpu-check DEVICE=cpu runs what has a meaning on a CPU\n")
    assert answer.stderr.count("\n") == 1


@pytest.mark.faults
def test_a_check_that_dies_or_hangs_does_not_hold() -> None:
    def never(device: torch.device) -> Answer:
        raise AssertionError(device)

    hanging = run_apart(Check("versions", "a claim", 0, never), "cpu")
    assert (hanging.holds, hanging.error) == (False, "no answer in 0 s")
    dying = run_apart(Check("memory", "a claim", 100, never), "cpu")
    assert dying.holds is False
    assert str(dying.error).startswith("exit 1: ")
    assert "| memory | **no** |" in table([dying])


@pytest.mark.parametrize(("holds", "code"), [(True, 0), (None, 0), (False, 1)])
def test_a_false_claim_is_exit_code_one(monkeypatch: pytest.MonkeyPatch, holds: bool | None, code: int) -> None:
    monkeypatch.setattr("sys.argv", ["gpu", "--device", "cpu", "--only", "graphs"])
    monkeypatch.setattr(checks, "run_apart", lambda check, _: Result(check.name, check.claim, holds, 1.0, {}))
    assert program.main() == code


@pytest.mark.faults
def test_a_signal_ends_every_process_and_prints_what_is_known() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--only", "versions", "bits"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert '"check": "versions"' in process.stdout.readline()
        while len(children := psutil.Process(process.pid).children(recursive=True)) < 2:  # a check and its training
            assert process.poll() is None
            time.sleep(0.02)
        process.terminate()
        printed = process.stdout.read()
        assert process.wait(timeout=60) == 1
    assert psutil.wait_procs(children, timeout=20)[1] == []
    assert "| versions | measured |" in printed
    assert "| bits | stopped |" in printed
    assert printed.endswith("Stopped before the end of bits.\n")
    assert not list(Path(tempfile.gettempdir()).glob("gpu-check-*"))
