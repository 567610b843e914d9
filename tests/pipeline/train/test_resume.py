"""A run that was stopped, moved or damaged: it continues to the same bits, or it says why it cannot."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from pipeline.runs.fingerprint import check_unchanged
from pipeline.runs.run import Run
from pipeline.runs.status import State, write_status
from tests.support.commands import MINE, Typed, journal
from tests.support.damage import flip_bit
from tests.support.paths import ROOT
from tests.support.processes import interruptible
from tests.support.resume import differences, results


def stop_at(line: str, root: Path, words: tuple[str, ...], *, by: signal.Signals) -> tuple[int, str]:
    """Start a run and send it a signal as soon as it prints `line`; return the exit code and the rest of its output."""
    command = [sys.executable, "-m", "pipeline.train", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with interruptible(), subprocess.Popen(command, cwd=root, env=environment, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert any(line in printed for printed in process.stdout), "it ended before it could be stopped"
        process.send_signal(by)
        rest = process.stdout.read()
        return process.wait(), rest


@pytest.mark.faults
def test_a_run_stopped_repeatedly_ends_in_the_same_bits(train: Typed, with_digits: Path) -> None:
    # A network with batch norm, dropout and stochastic depth: running averages and random numbers must continue too.
    net = ("+model=mobilenet", "model.variant=mobilenet_v3_small", "model.stochastic_depth=0.2")
    common = (*net, "recipe.optimizer.lr=0.001", "trainer.precision=32-true", "data.batch_size=32", "tracking=none")
    # Five steps per epoch, and points that span the ends of epochs, where checkpoints are.
    words = (*common, "recipe.epochs=3", "+trainer.limit_train_batches=5", "log_every=3")
    train(*words, "name=complete")
    runs, cut = with_digits / "runs", (*words, "name=cut")
    code, printed = stop_at("step 3/15", with_digits, cut, by=signal.SIGINT)
    assert (code, "stopped: the same command continues after step " in printed) == (130, True)
    code, printed = stop_at("step 6/15", with_digits, cut, by=signal.SIGTERM)
    assert (code, "stopped: the same command continues after step " in printed) == (143, True)
    assert stop_at("step 12/15", with_digits, cut, by=signal.SIGKILL)[0] == -signal.SIGKILL
    assert not (runs / "cut" / "result.json").exists()
    assert "continues after step" in train(*cut)
    complete, resumed = journal(runs / "complete"), journal(runs / "cut")
    assert len(complete) == 5 + 3
    assert resumed == complete
    weights = [
        torch.load(runs / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("complete", "cut")
    ]
    assert len(weights[0]) > 100
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())


@pytest.mark.usefixtures("killed_run")
def test_a_run_resumes_only_with_its_own_settings(train: Typed) -> None:
    words = (*MINE, "tracking=none")
    for change in ("recipe.optimizer.lr=0.2", "seed=1", "augment.training.flip=0.5"):
        with pytest.raises(ValueError, match=f"runs/mine was started with {change.partition('=')[0]}="):
            train(*words, change)
    with pytest.raises(ValueError, match="started with global_batch_size=256, not 128"):
        train(*words, "data.batch_size=128")
    assert "continues after step" in train(*words, "data.batch_size=128", "recipe.accumulate=2")


def test_each_field_of_the_fingerprint_is_refused_by_name(train: Typed, killed_run: Path) -> None:
    file = killed_run / "fingerprint.json"
    recorded = json.loads(file.read_text())
    assert len(recorded) > 40
    assert {"seed", "global_batch_size", "precision", "data.decoder", "digest of train", "torch"} <= recorded.keys()
    run = Run(killed_run)
    for name, value in recorded.items():
        other = {"half_pixels": 1} if name == "data.decoder" else f"not {value}"
        with pytest.raises(ValueError, match=f"mine was started with {re.escape(name)}="):
            check_unchanged(recorded | {name: other}, recorded, run=run.folder)
        missing = {key: its for key, its in recorded.items() if key != name}
        if name != "data.decoder":  # absent in runs of the first version, which all decoded on the CPU
            with pytest.raises(ValueError, match=f"mine was started with {re.escape(name)}="):
                check_unchanged(missing, recorded, run=run.folder)
    file.write_text(json.dumps(recorded | {"seed": 7}))
    with pytest.raises(
        ValueError, match=r"mine was started with seed=7, not 0: add name=NAME or another out=FOLDER for"
    ):
        train(*MINE, "tracking=none")


def test_a_moved_run_keeps_its_best_score_and_its_page(
    train: Typed, with_digits: Path, killed_run: Path, lenet_root: Path
) -> None:
    result = json.loads((lenet_root / "runs" / "mine" / "result.json").read_text())
    killed_run.parent.rename(with_digits / "elsewhere")
    train(*MINE, "runs=elsewhere")
    assert json.loads((with_digits / "elsewhere" / "mine" / "result.json").read_text()) == {
        "val/top1": result["val/top1"], "chosen_by": "val/top1",
        "checkpoint": "elsewhere/mine/checkpoints/best.ckpt", "checkpoint_sha256": result["checkpoint_sha256"],
    }  # fmt: skip
    client = MlflowClient(f"sqlite:///{with_digits / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("convoy")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    points = {key: client.get_metric_history(run.info.run_id, key) for key in ("train/loss", "params_millions")}
    assert [point.step for point in points["train/loss"]] == [2, 4, 6, 8, 10]
    assert [point.step for point in points["params_millions"]] == [0]


def test_one_process_at_a_time_trains_a_run(train: Typed, with_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(with_digits / "runs" / "mine")
    with run.locked():
        with pytest.raises(ValueError, match="runs/mine is locked by another process: add name=NAME or another out="):
            train(*MINE, "tracking=none")
        monkeypatch.setenv("SLURM_JOB_ID", "22")
        write_status(run.status_file, State.TRAINING, step=0)
        with pytest.raises(ValueError, match=rf"locked by process {os.getpid()} on \S+, job 22: add name=NAME"):
            train(*MINE, "tracking=none")


def test_a_damaged_checkpoint_is_named_and_the_older_one_continues_to_the_same_bits(
    train: Typed, killed_run: Path, lenet_root: Path
) -> None:
    flip_bit(killed_run / "checkpoints" / "step-10.ckpt", 0.3)
    printed = train(*MINE, "tracking=none")
    assert "damaged: runs/mine/checkpoints/step-10.ckpt is damaged: its SHA-256 is not that of its manifest" in printed
    assert "(continues after step 5)" in printed
    found = differences(results(lenet_root / "runs" / "mine"), results(killed_run))
    assert not found, "\n".join(found)
