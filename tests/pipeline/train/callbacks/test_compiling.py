"""`trainer.compile`: the same training, compiled."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pipeline.train.callbacks.compiling import CompileNetwork
from tests.support.commands import Typed, journal


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch compiles with g++ or clang++")
def test_a_compiled_network_trains_the_same(train: Typed, with_digits: Path) -> None:
    short = ("+model=lenet", "tracking=none", "trainer.precision=32-true", "recipe.epochs=1", "log_every=5")
    train(*short, "name=eager")
    assert "compiled    in " in train(*short, "name=compiled", "trainer.compile=true")
    eager, compiled = (with_digits / "runs" / name for name in ("eager", "compiled"))
    curves = journal(eager), journal(compiled)
    assert len(curves[0]) == 6
    for one, other in zip(*curves, strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
    states = [
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (eager, compiled)
    ]
    assert states[0].keys() == states[1].keys()


def test_the_clock_runs_from_the_first_batch_to_the_first_optimizer_step(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO())
    compiling, clock = CompileNetwork(True, console), iter([10.0, 15.0])
    monkeypatch.setattr("pipeline.train.callbacks.compiling.time.perf_counter", lambda: next(clock))
    for number in range(4):  # an accumulated batch
        compiling.on_train_batch_start(None, None, None, number)
    compiling.on_before_optimizer_step(None, None)
    compiling.on_before_optimizer_step(None, None)
    assert console.file.getvalue() == "compiled    in 5 s, with the first batch\n"


def test_a_machine_without_a_compiler_is_named(
    train: Typed, with_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ValueError, match=r"^trainer.compile=true needs a C\+\+ compiler, and there is no no-such-compi"
    ):
        train("+model=lenet", "tracking=none", "trainer.compile=true")


def test_a_mode_that_torch_does_not_have_is_refused(train: Typed, with_digits: Path) -> None:
    with pytest.raises(ValueError, match=r"^trainer.compile=fast is not true, null or one of default, reduce-overhead"):
        train("+model=lenet", "tracking=none", "trainer.compile=fast")
    assert not (with_digits / "runs").exists()
