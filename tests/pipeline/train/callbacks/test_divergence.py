"""A loss or a gradient that is not finite: the training ends, or leaves out one step, and no such state is saved."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from data.loading.order import TrainingPlan
from data.shards.dataset import Dataset
from pipeline.runs.checkpoint_writer import NonFiniteStateError, check_finite
from pipeline.train.callbacks.divergence import GuardFinite
from pipeline.train.ends import DivergedError
from tests.support.commands import Typed, journal
from tests.support.resume import Stop, checkpoint, differences, train_until

WORDS = (
    "+model=mobilenet", "model.variant=mobilenet_v3_small", "trust=true", "tracking=none", "trainer=cpu", "name=mine",
    "classifier._target_=tests.support.failing.Failing", "recipe.optimizer.lr=0.001", "data.batch_size=8",
    "+trainer.limit_train_batches=4", "+trainer.limit_val_batches=1", "recipe.epochs=2", "log_every=1",
)  # fmt: skip


@pytest.mark.parametrize(
    ("how", "what", "words"),
    [
        ("nan", "loss", ()),
        ("inf", "loss", ()),
        ("gradient", "gradient", ()),
        ("nan", "loss", ("trainer.precision=bf16-mixed",)),
        ("gradient", "gradient", ("recipe.clip_norm=1.0", "trainer.precision=64-true")),
    ],
)
def test_a_divergence_names_step_rate_and_samples_and_keeps_the_last_sound_checkpoint(
    train: Typed, with_digits: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch, how: str, what: str,
    words: tuple[str, ...],
) -> None:  # fmt: skip
    monkeypatch.setenv("FAIL", f"0,5,{how}")  # after five steps: in the second of the second epoch
    with pytest.raises(DivergedError) as error:
        train(*WORDS, *words)
    index = digits.index("train")
    plan = TrainingPlan(index.shard_samples, seed=0, shuffle_window=4_000_000, batch_size=8)
    names = index.keys(plan.samples(1, 1).tolist())
    rate = next(line["train/lr"] for line in journal(with_digits / "runs" / "mine") if line["step"] == 5)
    message = f"step 6 has a {what} that is not finite, at a learning rate of "
    assert str(error.value).startswith(message)
    assert float(str(error.value).removeprefix(message).split()[0]) != rate, "the schedule has moved on"
    assert f"with the samples {', '.join(names[:3])} and 5 more in nonfinite.json: lower recipe.optimizer.lr" in str(
        error.value
    )
    run = with_digits / "runs" / "mine"
    assert json.loads((run / "nonfinite.json").read_text()) == {"step": 6, "samples": names}
    assert checkpoint(run)["global_step"] == 4
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", 5, 2)
    assert not (run / "result.json").exists()


@pytest.mark.parametrize(("how", "what"), [("nan", "loss"), ("gradient", "gradient")])
def test_where_no_step_waits_the_next_save_finds_the_first_step_that_diverged(
    train: Typed, with_digits: Path, monkeypatch: pytest.MonkeyPatch, how: str, what: str
) -> None:
    """The way of a GPU, on a CPU: flags on the device, which a save reads."""
    begin = GuardFinite.on_fit_start

    def begin_without_waits(guard: GuardFinite, *arguments: pl.Trainer) -> None:
        begin(guard, *arguments)
        guard._waits = False

    monkeypatch.setattr(GuardFinite, "on_fit_start", begin_without_waits)
    monkeypatch.setenv("FAIL", f"0,5,{how}")
    with pytest.raises(DivergedError, match=f"^step 6 has a {what} that is not finite, at a learning rate of "):
        train(*WORDS)
    run = with_digits / "runs" / "mine"
    assert json.loads((run / "status.json").read_text())["step"] == 8, "it has trained to the end of the epoch"
    assert checkpoint(run)["global_step"] == 4


def test_a_skipped_step_leaves_weights_momentum_and_statistics_as_they_were(
    with_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(with_digits)
    monkeypatch.setenv("FAIL", "0,5,nan")
    words, run = (*WORDS, "on_nonfinite=skip", "checkpoint.every_steps=1"), with_digits / "runs" / "mine"
    assert train_until(Stop(6), *words) == 143
    before, after = (checkpoint(run, f"step-{step}.ckpt") for step in (5, 6))
    assert differences(before["state_dict"], after["state_dict"]) == []
    moments = [one["optimizer_states"][0]["state"] for one in (before, after)]
    assert len(moments[0]) > 50
    assert differences(*moments) == []
    assert before["lr_schedulers"] != after["lr_schedulers"]
    assert train_until(None, *words) == 0
    last = checkpoint(run)
    assert last["global_step"] == 8
    assert differences(last["state_dict"], after["state_dict"]) != []
    assert all(torch.isfinite(tensor).all() for tensor in last["state_dict"].values())
    assert last["callbacks"]["GuardFinite"] == {"skipped": 1}


def test_a_network_without_buffers_skips_a_step_too(
    train: Typed, with_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "0,5,nan")
    others = [word for word in WORDS if "mobilenet" not in word]
    train("+model=lenet", *others, "on_nonfinite=skip")
    last = checkpoint(with_digits / "runs" / "mine")
    assert last["callbacks"]["GuardFinite"] == {"skipped": 1}
    assert all(torch.isfinite(tensor).all() for tensor in last["state_dict"].values())


@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_a_training_without_a_finite_evaluation_is_a_divergence(
    train: Typed, with_digits: Path, monkeypatch: pytest.MonkeyPatch, choice: str
) -> None:
    """No loss of training follows the last step that would show it. The same command ends in the same way."""
    monkeypatch.setenv("FAIL", "0,100,nan")
    words = [word for word in WORDS if not re.search("mobilenet|optimizer.lr|limit_train|epochs", word)]
    large = ("recipe.optimizer.lr=1e38", "recipe.warmup=0.0", "recipe.epochs=1")
    for _ in range(2):
        with pytest.raises(DivergedError, match=r"^no evaluation up to step 1 had a finite loss, at a .*: lower"):
            train("+model=lenet", *words, *large, "+trainer.limit_train_batches=1", f"on_nonfinite={choice}")
    run = with_digits / "runs" / "mine"
    assert not (run / "result.json").exists()
    assert json.loads((run / "status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("part", ["state_dict", "optimizer_states"])
def test_no_checkpoint_holds_a_value_that_is_not_finite(part: str) -> None:
    weights, moments = {"net.weight": torch.ones(3)}, [{"state": {0: {"momentum_buffer": torch.ones(3)}}}]
    state = {"global_step": 7, "state_dict": weights, "optimizer_states": moments}
    check_finite(state)
    (weights["net.weight"] if part == "state_dict" else moments[0]["state"][0]["momentum_buffer"])[1] = torch.inf
    with pytest.raises(NonFiniteStateError, match=r"step 7 left NaN or infinite values in .*(weight|momentum_buffer)"):
        check_finite(state)


def test_a_run_that_is_sound_again_names_no_samples(
    train: Typed, with_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = with_digits / "runs" / "mine" / "nonfinite.json"
    monkeypatch.setenv("FAIL", "0,0,nan")
    with pytest.raises(DivergedError):
        train(*WORDS)
    assert file.is_file()
    monkeypatch.setenv("FAIL", "0,-1,none")
    train(*WORDS, "recipe.optimizer.lr=0.01")
    assert not file.exists()
