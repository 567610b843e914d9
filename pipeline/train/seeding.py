"""What a network draws at random in training: a function of seed, step and rank, as the order of the images is."""

from __future__ import annotations

import pytorch_lightning as pl
import torch

from data.loading.order import NETWORK, key


class SeedEachBatch(pl.Callback):
    """Seeds torch before every training batch, so that a resumed run drops the same units as one that never stopped.

    Ranks draw apart from each other. Evaluations draw nothing that training would miss.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Seed by the optimizer steps done and the batch's place in the epoch, which accumulated batches differ in."""
        device = pl_module.device
        # The one generator that is drawn from: torch.manual_seed asks after every kind of device, 0.2 ms each time.
        generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
        generator.manual_seed(int(key(NETWORK, self.seed, trainer.global_step, batch_idx, trainer.global_rank)))
