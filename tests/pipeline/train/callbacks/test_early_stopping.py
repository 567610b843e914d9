"""Early stopping: when it stops, that it says so, and that neither a kill nor another rank changes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from math import nan
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from models.learning.classifier import Classifier
from models.learning.evaluation import METRICS_BY_NAME
from pipeline.build.choice import Choice
from pipeline.train.callbacks.early_stopping import StopEarly
from tests.support.commands import TWO_RANKS, Run, Typed, journal
from tests.support.scored import SCORES, Scored, fit_scored, saving_in

# Its evaluations are those of `SCORES`; four steps an epoch.
SCRIPTED = (
    "+model=lenet", "classifier._target_=tests.support.scored.ScoredClassifier", "trust=true", "tracking=none",
    "recipe.epochs=6", "data.batch_size=64", "+trainer.limit_train_batches=4", "log_every=3", "name=scripted",
)  # fmt: skip


class Killed(Exception):
    """Stands for the end of a process."""


class Kill(pl.Callback):
    """Ends a training at the start of an epoch, or after the last checkpoint."""

    def __init__(self, epoch: int | None) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            raise Killed

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.epoch is not None:
            raise Killed


def choice(metric: str, patience: int, min_improvement: float = 0.0) -> Choice:
    return Choice(METRICS_BY_NAME[metric], patience, min_improvement)


def epochs_by_hand(scores: Sequence[float], patience: int, *, sign: int, margin: float) -> int:
    """Count the epochs until `patience` scores in a row were no improvement."""
    best, waited = -float("inf"), 0
    for number, score in enumerate(scores, start=1):
        if sign * score - margin > best:
            best, waited = sign * score, 0
        else:
            waited += 1
        if waited == patience:
            return number
    return len(scores)


@pytest.mark.parametrize("metric", ["top1", "loss"])
@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize("margin", [0.0, 0.25])
@pytest.mark.parametrize(
    "scores",
    [
        (0.25, 0.5, 0.75, 0.75, 0.75, 0.75, 0.75),
        (0.5, 0.25, 0.375, 0.5, 0.625, 1.0, 1.25),
        (2.0, 1.75, 1.5, 1.5, 1.0, 0.875, 0.75),
        (nan, nan, 0.5, nan, 1.5, 0.5, nan),
    ],
)
def test_it_stops_after_evaluations_without_an_improvement(
    metric: str, patience: int, margin: float, scores: tuple[float, ...]
) -> None:
    stop, sign = StopEarly(choice(metric, patience, margin), num_epochs=7), -1 if metric == "loss" else 1
    trainer = fit_scored(Scored(scores, f"val/{metric}"), stop, num_epochs=7)
    epochs = epochs_by_hand(scores, patience, sign=sign, margin=margin)
    assert trainer.global_step == 3 * epochs
    assert (stop.reason is not None) == (epochs < 7)
    if epochs < 7:
        assert stop.reason.startswith(f"epoch {epochs} of 7: val/{metric} did not improve")


def test_the_reason_names_metric_margin_and_patience() -> None:
    for patience, margin, text in (
        (2, 0.25, "epoch 3 of 5: val/top1 did not improve by more than 0.25 in the last 2 evaluations"),
        (1, 0.0, "epoch 2 of 5: val/top1 did not improve in the last evaluation"),
    ):
        stop = StopEarly(choice("top1", patience, margin), num_epochs=5)
        fit_scored(Scored((0.5,) * 5), stop, num_epochs=5)
        assert stop.reason == text


def test_a_training_that_ends_as_planned_has_not_stopped_early() -> None:
    stop = StopEarly(choice("top1", 2), num_epochs=3)
    assert fit_scored(Scored((0.5, 0.25, 0.25)), stop, num_epochs=3).global_step == 9
    assert stop.wait_count == 2
    assert stop.reason is None


@pytest.mark.parametrize("kills", [[3], [1, 2, 3, 4], [2, None], [None, None]], ids=str)
def test_a_killed_run_stops_at_the_same_epoch_with_the_same_bits(tmp_path: Path, kills: list[int | None]) -> None:
    """Killed at the start of some epochs, or (None) after it has decided to stop."""
    scores = (0.25, 0.75, 0.5, 0.625, 0.5, 0.9, 0.95, 1.0)

    def start(name: str, epoch: int | None) -> pl.Trainer:
        last = tmp_path / name / "last.ckpt"
        stop, saving = StopEarly(choice("top1", 3), num_epochs=8), saving_in(last.parent)
        kill = Kill(99 if epoch is None else epoch)
        callbacks = (stop, saving, *([] if name == "complete" else [kill]))
        resume = str(last) if last.exists() else None
        return fit_scored(Scored(scores), *callbacks, num_epochs=8, resume=resume)

    complete = start("complete", None)
    assert complete.global_step == 15
    for epoch in kills:
        try:
            ended = start("killed", epoch)
        except Killed:
            continue
        assert epoch is None, "it must have been killed"
        assert ended.global_step == 15, "it has decided before, so it trains no more"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kill, "on_train_end", lambda *arguments: None)
        resumed = start("killed", None)
    assert resumed.global_step == 15
    assert resumed.early_stopping_callbacks[0].reason == complete.early_stopping_callbacks[0].reason
    for name in ("last.ckpt", "best.ckpt"):
        one, other = (torch.load(tmp_path / run / name, weights_only=True) for run in ("complete", "killed"))
        assert one["global_step"] == other["global_step"] == (15 if name == "last.ckpt" else 6)
        assert torch.equal(one["state_dict"]["weight"], other["state_dict"]["weight"])
        assert one["optimizer_states"][0]["state"] == other["optimizer_states"][0]["state"]


def test_an_epoch_without_an_evaluation_does_not_count() -> None:
    stop = StopEarly(choice("top1", 2), num_epochs=9)
    trainer = fit_scored(Scored((0.5,) * 9), stop, num_epochs=9, check_val_every_n_epoch=2)
    assert trainer.global_step == 3 * 6
    assert stop.reason == "epoch 6 of 9: val/top1 did not improve in the last 2 evaluations"


def test_a_stopped_run_succeeds_and_says_why(train: Typed, with_digits: Path) -> None:
    printed = train(*SCRIPTED, "stop_early=2")
    run, reason = with_digits / "runs" / "scripted", "epoch 4 of 6: val/top1 did not improve in the last 2 evaluations"
    assert "stop early  after 2 evaluations in a row without an improvement of val/top1\n" in printed
    assert f"stopped early  {reason}\n" in printed
    assert "best val/top1  0.7500 on 359 images of split val\n" in printed
    result = json.loads((run / "result.json").read_text())
    assert result == {
        "val/top1": 0.75,
        "chosen_by": "val/top1",
        "checkpoint": "runs/scripted/checkpoints/best.ckpt",
        "checkpoint_sha256": hashlib.sha256((run / "checkpoints" / "best.ckpt").read_bytes()).hexdigest(),
        "stopped_early": reason,
    }
    lines, weights = journal(run), (run / "checkpoints" / "last.ckpt").read_bytes()
    assert [line["val/top1"] for line in lines if "val/top1" in line] == [*SCORES["val/top1"][:4]]
    # Killed between its last checkpoint and its result: it only writes the result.
    (run / "result.json").unlink()
    assert f"stopped early  {reason}\n" in train(*SCRIPTED, "stop_early=2")
    assert json.loads((run / "result.json").read_text()) == result
    assert (journal(run), (run / "checkpoints" / "last.ckpt").read_bytes()) == (lines, weights)


def test_a_run_killed_twice_stops_as_one_that_was_not(
    train: Typed, with_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, words = with_digits / "runs", (*SCRIPTED, "stop_early=2", "choose_by=loss", "trainer.precision=32-true")
    train(*words, "name=complete")
    step = Classifier.training_step
    for epoch in (2, 4):

        def crash(module: Classifier, batch: object, number: int, epoch: int = epoch) -> torch.Tensor:
            if (module.current_epoch, number) == (epoch, 2):
                raise Killed
            return step(module, batch, number)

        monkeypatch.setattr(Classifier, "training_step", crash)
        with pytest.raises(Killed):
            train(*words, "name=cut")
    monkeypatch.setattr(Classifier, "training_step", step)
    assert "continues after step" in train(*words, "name=cut")
    results = [json.loads((runs / name / "result.json").read_text()) for name in ("complete", "cut")]
    assert results[0]["stopped_early"] == "epoch 5 of 6: val/loss did not improve in the last 2 evaluations"
    assert results[1] == results[0] | {"checkpoint": "runs/cut/checkpoints/best.ckpt"}
    assert len(journal(runs / "complete")) == 6 + 5  # points of 20 steps, and evaluations
    assert journal(runs / "complete") == journal(runs / "cut")
    for name in ("last.ckpt", "best.ckpt"):
        one, other = (
            torch.load(runs / run / "checkpoints" / name, weights_only=True)["state_dict"]
            for run in ("complete", "cut")
        )
        assert len(one) == 10
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.faults
def test_two_ranks_stop_together(run_verb: Run, with_digits: Path) -> None:
    answer = run_verb("train", *SCRIPTED, *TWO_RANKS, "data.batch_size=32", "stop_early=2", "min_improvement=0.2")
    assert answer.returncode == 0, answer.stderr
    reason = "epoch 4 of 6: val/top1 did not improve by more than 0.2 in the last 2 evaluations"
    assert answer.stdout.count(f"stopped early  {reason}\n") == 1
    result = json.loads((with_digits / "runs" / "scripted" / "result.json").read_text())
    assert (result["val/top1"], result["stopped_early"]) == (0.75, reason)
    steps = [line["step"] for line in journal(with_digits / "runs" / "scripted") if "val/top1" in line]
    assert steps == [4, 8, 12, 16]
