"""Random numbers of the network and of mixing: a function of seed, step and rank, like the order of the images."""

import pytorch_lightning as pl
import torch

from data.draws import NETWORK, key
from models.learning.classifier import Classifier


class SeedEachBatch(pl.Callback):
    """Seed torch, and the mixing of images, before every training batch, so that a resumed run draws the same numbers.

    Ranks draw different numbers. Evaluation draws none.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Seed by optimizer step, position in the epoch (accumulated batches share a step) and rank."""
        assert isinstance(pl_module, Classifier)
        batch_key = int(key(NETWORK, self.seed, trainer.global_step, batch_idx, trainer.global_rank))
        pl_module.batch_key, device = batch_key, pl_module.device
        # Only the generator in use: torch.manual_seed queries every kind of device, 0.2 ms each time.
        generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
        generator.manual_seed(batch_key)
