"""Short trainings that are stopped at chosen points, and what they leave."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytorch_lightning as pl
import torch

from pipeline.cli.signals import stop_signals
from pipeline.train import __main__ as train_verb
from pipeline.train import fit
from tests.support.commands import COMPUTED, call_verb, journal

# Dropout, augmented and mixed images, averages, early stopping, points across the ends of epochs: all must continue.
TWELVE_STEPS = (
    "+model=lenet", "model.dropout=0.3", "recipe.optimizer.lr=0.01", "trainer=cpu", "trainer.precision=32-true",
    "data.batch_size=16", "+trainer.limit_train_batches=4", "+trainer.limit_val_batches=2", "recipe.epochs=3",
    "augment=reference", "policy=randaugment", "erasing=pixel", "mix=mixup_cutmix", "recipe.mix.off_epoch=2",
    "stop_early=9", "log_every=3", "tracking=none",
    "averaging=ema", "averaging.min_windows=0", "choose_by=val_ema/top1",
)  # fmt: skip


class Stop(NamedTuple):
    """A signal that arrives during an optimizer step, counted from 1, or during the evaluation after it."""

    step: int
    in_evaluation: bool = False


POINTS = [Stop(step) for step in range(1, 13)]
EVALUATIONS = [Stop(step, in_evaluation=True) for step in (4, 8, 12)]


class _Signal(pl.Callback):
    """Behaves as if a signal arrived, without one: pytest has its own handlers."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop

    def on_train_batch_start(self, trainer: pl.Trainer, *rest: object) -> None:
        if not self.stop.in_evaluation and trainer.global_step + 1 == self.stop.step:
            stop_signals.first = signal.SIGTERM

    def on_validation_batch_start(self, trainer: pl.Trainer, *rest: object) -> None:
        if self.stop.in_evaluation and trainer.global_step == self.stop.step:
            stop_signals.first = signal.SIGTERM


@contextmanager
def stopping_at(stop: Stop | None) -> Iterator[None]:
    """Let the trainings of this block stop."""
    own = fit.own_callbacks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stop_signals, "first", None)
        if stop is not None:
            patch.setattr(fit, "own_callbacks", lambda job: [_Signal(stop), *own(job)])
        yield


def train_until(stop: Stop | None, *words: str) -> int:
    """Train in this process until a stop, or to the end; return the exit code."""
    with stopping_at(stop):
        try:
            call_verb(train_verb.VERB, train_verb.main, list(words))
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


def checkpoint(run: Path, name: str = "last.ckpt") -> dict[str, Any]:
    """Load a checkpoint of a run."""
    loaded: dict[str, Any] = torch.load(run / "checkpoints" / name, weights_only=True)
    return loaded


def results(run: Path) -> dict[str, Any]:
    """Everything that a finished training has computed."""
    result = json.loads((run / "result.json").read_text())
    return {
        "last": checkpoint(run), "best": checkpoint(run, "best.ckpt"), "journal": journal(run),
        "result": {key: result[key] for key in result if key in COMPUTED},
    }  # fmt: skip


def differences(one: object, other: object, name: str = "") -> list[str]:
    """Return where two results differ in a single bit."""
    if isinstance(one, torch.Tensor):
        return [] if isinstance(other, torch.Tensor) and torch.equal(one, other) else [name]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key in one for found in differences(one[key], other[key], f"{name}.{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for number, (a, b) in pairs for found in differences(a, b, f"{name}.{number}")]
    return [] if one == other else [name]
