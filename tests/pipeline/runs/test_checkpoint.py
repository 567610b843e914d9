"""The checkpoints that a run keeps, after good epochs and after bad ones."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pipeline.runs.checkpoint import AtomicCheckpointIO, BestCheckpoint

SCORES = (0.5, 0.3, 0.7, 0.6, 0.2)


class Scored(pl.LightningModule):
    """One weight, and a score for each epoch that is known beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Tensor, batch_index: int) -> Tensor:
        return (self.weight - batch).square().mean()

    def validation_step(self, batch: Tensor, batch_index: int) -> None:
        self.log("val/top1", torch.tensor(SCORES[self.current_epoch]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Look(pl.Callback):
    """The steps of both checkpoints when the next epoch begins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[tuple[int, ...]] = []

    def look(self) -> None:
        names = ("last.ckpt", "best.ckpt")
        self.steps.append(tuple(torch.load(self.folder / name, weights_only=True)["global_step"] for name in names))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch:
            self.look()


def test_the_last_epoch_is_kept_whether_or_not_it_was_the_best(tmp_path: Path) -> None:
    look = Look(tmp_path)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=len(SCORES), logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, callbacks=[look, BestCheckpoint(tmp_path, monitor="val/top1")],
        plugins=[AtomicCheckpointIO()],
    )  # fmt: skip
    batches = DataLoader(torch.randn(6, 1), batch_size=2)
    trainer.fit(Scored(), batches, batches)
    look.look()
    assert look.steps == [(3, 3), (6, 3), (9, 9), (12, 9), (15, 9)]
