"""The checkpoints that a run keeps, after good epochs and after bad ones."""

from __future__ import annotations

from math import inf, nan
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from tests.support.scored import Scored, fit_scored, saving_in

SCORES = (0.5, 0.3, 0.7, 0.6, 0.2)


class Look(pl.Callback):
    """The steps of both checkpoints when the next epoch begins; 0 for one that is missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[tuple[int, ...]] = []

    def look(self) -> None:
        files = [self.folder / name for name in ("last.ckpt", "best.ckpt")]
        steps = (torch.load(one, weights_only=True)["global_step"] if one.exists() else 0 for one in files)
        self.steps.append(tuple(steps))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch:
            trainer.strategy.checkpoint_io.wait()
            self.look()


@pytest.mark.parametrize(
    ("mode", "scores", "best_steps"),
    [
        ("max", SCORES, (3, 3, 9, 9, 9)),
        ("min", SCORES, (3, 6, 6, 6, 15)),
        ("max", (nan, 0.3, nan, 0.6, nan), (0, 6, 6, 12, 12)),
        ("min", (nan, inf, 0.3, nan, 0.2), (0, 0, 9, 9, 15)),
        ("min", (nan, nan, nan, nan, nan), (0, 0, 0, 0, 0)),
    ],
)
def test_the_last_epoch_is_kept_whether_or_not_it_was_the_best(
    tmp_path: Path, mode: str, scores: tuple[float, ...], best_steps: tuple[int, ...]
) -> None:
    look, saving = Look(tmp_path), saving_in(tmp_path, mode=mode)
    fit_scored(Scored(scores), look, saving, num_epochs=5)
    look.look()
    assert look.steps == list(zip((3, 6, 9, 12, 15), best_steps, strict=True))
    if not any(best_steps):
        assert saving.best is None
