"""Trainings whose evaluations are known beforehand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from models.learning.classifier import Classifier
from pipeline.runs.checkpoint_writer import CheckpointWriter
from pipeline.runs.checkpoints import CheckpointFolder
from pipeline.runs.journal import Journal
from pipeline.train.callbacks.divergence import GuardFinite
from pipeline.train.callbacks.saving import SaveCheckpoints

SCORES = {  # of the epochs of a `ScoredClassifier`
    "val/top1": (0.5, 0.75, 0.625, 0.625, 0.875, 0.5),
    "val/loss": (math.nan, 2.0, 1.0, math.nan, 1.5, 2.0),
    "val/f1_macro": (0.25, 0.25, 0.25, 0.25, 0.25, 0.25),
    "val/balanced_accuracy": (math.nan,) * 6,
}


class Scored(pl.LightningModule):
    """One weight with momentum, and a score for each epoch."""

    def __init__(self, scores: Sequence[float], key: str = "val/top1") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.scores, self.key = scores, key

    def training_step(self, batch: Tensor, batch_index: int) -> Tensor:
        return (self.weight - batch).square().mean()

    def validation_step(self, batch: Tensor, batch_index: int) -> None:
        self.log(self.key, torch.tensor(self.scores[self.current_epoch]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class ScoredClassifier(Classifier):
    """A classifier that trains, and logs the values of `SCORES` instead of its own. Shapes: (N, C, H, W) -> (N, K)."""

    def log(self, name: str, value: object, *rest: object, **options: object) -> None:
        """Log the value of this epoch."""
        known = SCORES.get(name)
        super().log(name, value if known is None else torch.tensor(known[self.current_epoch]), *rest, **options)


def saving_in(folder: Path, *, monitor: str | None = "val/top1", mode: str = "max") -> SaveCheckpoints:
    """Return the callback that saves the checkpoints of a training in a folder."""
    data = SimpleNamespace()  # only for the names of samples in a message
    guard = GuardFinite("stop", data=data, report=print)
    journal = Journal(folder / "metrics.jsonl")
    return SaveCheckpoints(CheckpointFolder(folder), journal, guard=guard, monitor=monitor, mode=mode)


def fit_scored(
    module: Scored, *callbacks: pl.Callback, num_epochs: int, resume: str | None = None, **options: object
) -> pl.Trainer:
    """Train epochs of three steps as `pipeline.train` does, from a checkpoint if one is given."""
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    length = {"max_epochs": -1, "max_steps": 3 * num_epochs, "num_sanity_val_steps": 0}
    saving = [one for one in callbacks if isinstance(one, SaveCheckpoints)]
    guards = [one.guard for one in saving]
    own = {"callbacks": [*guards, *callbacks], "plugins": [CheckpointWriter(one.folder) for one in saving]}
    own["enable_checkpointing"] = bool(saving)
    trainer = pl.Trainer(accelerator="cpu", **own, **length, **quiet, **options)
    images = torch.randn(6, 1, generator=torch.Generator().manual_seed(0))
    batches = DataLoader(images, batch_size=2)
    trainer.fit(module, batches, batches, ckpt_path=resume, weights_only=True)
    return trainer
