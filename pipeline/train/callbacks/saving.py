"""When a training saves its state."""

import math
import time
from contextlib import suppress
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint as CheckpointCallback

from models.arguments import require
from pipeline.cli.errors import FailureError
from pipeline.runs.checkpoint_writer import CheckpointWriter
from pipeline.runs.checkpoints import Best, Checkpoint, CheckpointFolder
from pipeline.runs.journal import Journal
from pipeline.train.callbacks.divergence import GuardFinite
from pipeline.train.callbacks.loop_state import Point, loop_state, point_after_batch

LOSS = "val/loss"


class SaveCheckpoints(CheckpointCallback):
    """Save at the end of each epoch, every `every_steps` steps, and where the training is stopped.

    The best checkpoint is the first whose evaluation reached the maximum of `monitor`, or with the mode "min" the
    minimum. A value that is not finite is never the best. Raises: ValueError for an interval below 1.
    """

    def __init__(
        self, folder: CheckpointFolder, journal: Journal, *, guard: GuardFinite, monitor: str | None, mode: str = "max",
        every_steps: int | None = None,
    ) -> None:  # fmt: skip
        is_count = isinstance(every_steps, int) and every_steps is not True and every_steps >= 1
        rule = "must be an integer of at least 1, or null"
        require(every_steps is None or is_count, rule, every_steps=every_steps)
        self.folder, self.journal, self.guard = folder, journal, guard
        self.monitor, self.mode = monitor, mode
        self.every_steps = every_steps
        self.best: Best | None = None
        self.had_finite_loss: bool | None = None  # in any evaluation so far, None without one
        self.saved_at = time.monotonic()
        self._point, self._is_beyond = Point.EPOCH, False

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note whether only the evaluation after the last step is left."""
        is_evaluation = checkpoint["loops"]["point"] == Point.EVALUATION.name
        self._is_beyond = is_evaluation and checkpoint["global_step"] >= trainer.max_steps

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; let Lightning enter an epoch that has no step left."""
        self.saved_at = time.monotonic()
        if self._is_beyond:
            trainer.fit_loop.epoch_loop.max_steps += 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Save where `every_steps` is due, and raise what a write has raised."""
        if trainer.is_global_zero:
            self._writer(trainer).check()
        if self.every_steps is not None and is_at_step(trainer) and trainer.global_step % self.every_steps == 0:
            self.save(trainer, point_after_batch(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge the epoch's evaluation, and save."""
        if self._is_beyond:
            trainer.fit_loop.epoch_loop.max_steps -= 1
            self._is_beyond = False
        loss = trainer.callback_metrics.get(LOSS)
        if loss is not None:
            self.had_finite_loss = bool(self.had_finite_loss) or math.isfinite(float(loss))
        value = trainer.callback_metrics.get(self.monitor or "")
        score = math.nan if value is None else float(value)
        sign = 1 if self.mode == "max" else -1
        if math.isfinite(score) and (self.best is None or sign * score > sign * self.best.score):
            self.best = Best(trainer.global_step, score)
        self.save(trainer, Point.EPOCH)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the last write."""
        self.wait(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Wait for a write in flight, which has nothing to do with the error; one that fails is not the cause."""
        with suppress(OSError, FailureError):
            self.wait(trainer)

    def save(self, trainer: pl.Trainer, point: Point) -> None:
        """Save the state after an optimizer step, with what comes next. Every rank must call it at the same batch."""
        self._point = point
        self.guard.check(trainer)
        length, digest = self.journal.digest() if trainer.is_global_zero else (0, "")
        described = Checkpoint(trainer.global_step, 0, "", self.best, length, digest)
        trainer.save_checkpoint(self.folder.path / described.file, storage_options=described)
        self.saved_at = time.monotonic()

    def wait(self, trainer: pl.Trainer) -> None:
        """Wait until what was saved is on the disk, on the rank that writes it."""
        if trainer.is_global_zero:
            self._writer(trainer).wait()

    def state_dict(self) -> dict[str, Any]:
        """Return the best step and its score, and whether an evaluation had a finite loss."""
        return {"best": None if self.best is None else vars(self.best), "had_finite_loss": self.had_finite_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with those of a checkpoint."""
        self.best = Best(**state_dict["best"]) if state_dict["best"] else None
        self.had_finite_loss = state_dict["had_finite_loss"]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Replace the counts of Lightning's loops by those with which it continues exactly."""
        checkpoint["loops"] = {"fit_loop": loop_state(trainer, self._point), "point": self._point.name}

    def _writer(self, trainer: pl.Trainer) -> CheckpointWriter:
        writer = trainer.strategy.checkpoint_io
        assert isinstance(writer, CheckpointWriter)
        return writer


def is_at_step(trainer: pl.Trainer) -> bool:
    """Return whether the batch that ends has ended an optimizer step."""
    return not trainer.fit_loop._should_accumulate()
