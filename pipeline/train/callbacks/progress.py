"""The progress of a training: lines or a bar for people, points for the journal and the dashboard."""

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import psutil
import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.loading.datamodule import ShardData
from data.loading.loader import TrainingLoader
from models.arguments import require
from models.learning.classifier import Classifier
from models.learning.evaluation import METRICS_BY_NAME
from pipeline.cli.console import print_line

Record = Callable[[Mapping[str, float], int], None]  # values and the optimizer step


class ProgressCallback(pl.Callback):
    """Record a point of each curve every `log_every` optimizer steps, and the metrics of each evaluation.

    A terminal shows a bar, other outputs a line per point. Only rank 0 writes, but every rank needs the callback,
    because metrics are summed over ranks.

    Raises: RuntimeError when an evaluation did not count every image once.
    """

    def __init__(self, console: Console, record: Record, *, data: ShardData, log_every: int, num_epochs: int) -> None:
        require(log_every >= 1, "must be at least 1", log_every=log_every)
        self.console, self.record, self.data = console, record, data
        self.log_every, self.num_epochs = log_every, num_epochs
        self.bar: Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clocks and the bar."""
        self.start = self._since = time.perf_counter()
        self._first_step = self._step = trainer.global_step
        self._waited = 0.0
        self._loss = ""
        if trainer.is_global_zero and self.console.is_terminal:
            text, speed = TextColumn("{task.description}"), TextColumn("{task.fields[speed]}")
            columns = (text, BarColumn(None), MofNCompleteColumn(), speed, TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console)
            self._task = self.bar.add_task("training", total=trainer.max_steps, completed=self._step, speed="")
            self.bar.start()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Read the learning rate of this step, before the schedule advances."""
        self._lr = float(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, and record a point when one is due."""
        step = trainer.global_step
        if self.bar is not None:
            self.bar.update(self._task, completed=step, description=f"{self._epoch(trainer)}  {self._loss}")
        # Points depend on the step alone, so that a resumed run records the same. Accumulated batches share a step.
        is_due = step % self.log_every == 0 or step == trainer.max_steps
        if is_due and step != self._step:
            self._record_point(trainer, step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pause the clock of the training."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that every image was counted once; record and print the metrics."""
        assert isinstance(pl_module, Classifier)
        values = {key: float(value) for key, value in trainer.callback_metrics.items() if key in METRICS_BY_NAME}
        limit, counted = trainer.limit_val_batches, pl_module.evaluated_images
        is_complete = isinstance(limit, float) and limit == 1.0  # the integer 1 is a single batch
        if is_complete and counted != self.data.num_evaluation_images:
            indexed = f"the index of {self.data.evaluation_split} has {self.data.num_evaluation_images}"
            raise RuntimeError(f"evaluation counted {counted} images, {indexed}")
        self._since += time.perf_counter() - self._paused
        if not trainer.is_global_zero:
            return
        self.record(values, trainer.global_step)
        metrics = "  ".join(f"{key} {value:.4f}" for key, value in values.items())
        self.print(f"{self._epoch(trainer)}  {metrics}  images {pl_module.evaluated_images:,}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the bar."""
        self._stop_bar()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the bar after an error too."""
        self._stop_bar()

    def _epoch(self, trainer: pl.Trainer) -> str:
        return f"epoch {trainer.current_epoch + 1}/{self.num_epochs}"

    def _stop_bar(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _record_point(self, trainer: pl.Trainer, step: int) -> None:
        module = trainer.lightning_module
        assert isinstance(module, Classifier)
        metrics = module.training_metrics.take(module)
        loader = trainer.train_dataloader
        assert isinstance(loader, TrainingLoader)
        now, waited = time.perf_counter(), loader.wait_seconds
        seconds, steps = now - self._since, step - self._step
        images_per_step = self.data.images_per_step(trainer.world_size)
        values = {
            "train/loss": metrics.loss,
            "train/top1": metrics.top1,
            "train/lr": self._lr,
            "train/images_per_second": steps * images_per_step / seconds,
            "train/data_wait_fraction": (waited - self._waited) / seconds,
            "train/memory_gib": memory_gib(module.device),
        }
        if metrics.top5 is not None:
            values["train/top5"] = metrics.top5
        self._since, self._waited, self._step = now, waited, step
        if trainer.is_global_zero:
            self.record(values, step)
            self._show_point(trainer, values, step=step)

    def _show_point(self, trainer: pl.Trainer, values: dict[str, float], *, step: int) -> None:
        speed = f"{values['train/images_per_second']:,.0f} images/s"
        if self.bar is not None:
            self._loss = f"loss {values['train/loss']:.3f}"
            self.bar.update(self._task, speed=speed)
            return
        passed = time.perf_counter() - self.start
        eta = passed / max(1, step - self._first_step) * (trainer.max_steps - step)
        self.print(
            f"step {step}/{trainer.max_steps}  loss {values['train/loss']:.4f}  lr {values['train/lr']:.4g}  {speed}"
            f"  data wait {values['train/data_wait_fraction']:.0%}  memory {values['train/memory_gib']:.1f} GiB"
            f"  eta {timedelta(seconds=round(eta))}"
        )

    def print(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        print_line(self.bar.console if self.bar is not None else self.console, line)


def memory_gib(device: torch.device) -> float:
    """Return the memory in use on a GPU, or the resident memory of this process on a CPU, in GiB.

    That of a GPU counts everything on it: torch's, DALI's pools, libraries and other processes.
    """
    if device.type != "cuda":
        return float(psutil.Process().memory_info().rss) / 2**30
    free, total = torch.cuda.mem_get_info(device)
    return float(total - free) / 2**30
