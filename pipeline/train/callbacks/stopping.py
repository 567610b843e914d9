"""Between two steps: agree with all ranks on a stop or a save, and do it after the same step."""

import os
import signal
import time
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.distributed
from pytorch_lightning.callbacks import Checkpoint as CheckpointCallback

from data.children import PARENT
from models.arguments import require
from pipeline.cli.signals import StopSignals
from pipeline.train.callbacks.divergence import GuardFinite
from pipeline.train.callbacks.loop_state import point_after_batch
from pipeline.train.callbacks.saving import SaveCheckpoints, is_at_step
from pipeline.train.ends import Stopped

SECONDS_BETWEEN_READINGS = 0.5


class Wanted(NamedTuple):
    """A signal to stop for, 0 for none; whether to save; whether to end because something is not finite."""

    stop: int = 0
    save: bool = False
    end: bool = False

    def merged(self, other: "Wanted") -> "Wanted":
        """Return everything that either wants."""
        return Wanted(max(self.stop, other.stop), self.save or other.save, self.end or other.end)


class StopTogether(CheckpointCallback):  # which Lightning runs after all others
    """Stop after a signal to any rank, save every `every_minutes` minutes, end with `guard`; all ranks after one step.

    About twice a second the ranks reduce what each of them wants, so that no step waits for it. A reduction starts
    after one batch and is read after a later one; how many batches later is part of the reduction, so all ranks agree.
    One rank on a CPU decides after every batch.
    Raises: ValueError for an interval that is not above 0.
    """

    def __init__(
        self, saving: SaveCheckpoints, guard: GuardFinite, *, signals: StopSignals, every_minutes: float | None
    ) -> None:
        is_valid = every_minutes is None or every_minutes > 0
        require(is_valid, "must be a number above 0, or null", every_minutes=every_minutes)
        self.saving, self.guard, self.signals = saving, guard, signals
        self._seconds = None if every_minutes is None else 60 * every_minutes
        self._interval, self._batches = 1, 0  # batches between a start and its reading; since the last start
        self._pending: _Reduction | None = None
        self._since = 0.0
        self._wanted = Wanted()  # by any rank, and not done yet

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave out Lightning's own reaction, which broadcasts before every batch and in its handler (issue 21487)."""
        os.environ.pop(PARENT, None)  # Lightning has started its ranks; what callbacks start may outlive this process
        connector: Any = trainer._signal_connector
        connector.register_signal_handlers = lambda: None
        epoch_loop: Any = trainer.fit_loop.epoch_loop
        epoch_loop._broadcast_sigterm_tensor = lambda: None
        on_gpu = pl_module.device.type == "cuda"
        self._stream = torch.cuda.Stream(pl_module.device) if on_gpu else None  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._is_alone = trainer.world_size == 1 and not on_gpu

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: object) -> None:
        """Stop, save or end where that is wanted, at the end of an optimizer step."""
        self._read()
        if is_at_step(trainer):
            if self._wanted.end:
                self.guard.check(trainer)
            if self._wanted.stop or self._wanted.save:
                self._save(trainer)
        self._start(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: object) -> None:
        """Stop within an evaluation, which a resumed training repeats."""
        self._read()
        if self._wanted.stop:
            self._save(trainer)
        self._start(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the reduction in flight."""
        if self._pending is not None:
            self._pending.read()
            self._pending = None

    def _save(self, trainer: pl.Trainer) -> None:
        """Save, and raise Stopped if that is wanted."""
        wanted, self._wanted = self._wanted, Wanted()
        self.saving.save(trainer, point_after_batch(trainer))
        if wanted.stop:
            self.saving.wait(trainer)
            trainer.strategy.barrier()  # a launcher may kill the rank that writes, once another has ended
            raise Stopped(signal.Signals(wanted.stop), step=trainer.global_step)

    def _wish(self) -> Wanted:
        is_due = self._seconds is not None and time.monotonic() - self.saving.saved_at > self._seconds
        return Wanted(stop=int(self.signals.first or 0), save=is_due)

    def _read(self) -> None:
        """Read the reduction that is due."""
        if self._is_alone:
            self._wanted = self._wish()
            return
        self._batches += 1
        if self._pending is not None and self._batches >= self._interval:
            wanted, seconds = self._pending.read()
            self._wanted, self._pending = self._wanted.merged(wanted), None
            self._interval = max(1, int(SECONDS_BETWEEN_READINGS / seconds))

    def _start(self, trainer: pl.Trainer) -> None:
        """Start the next reduction."""
        if self._is_alone or self._pending is not None:
            return
        now = time.perf_counter()
        seconds, self._since = (now - self._since) / self._batches, now
        found = None if self._stream is None else self.guard.found
        self._pending = _Reduction(self._wish(), seconds, found=found, stream=self._stream)
        self._batches = 0


class _Reduction:
    """The maximum over all ranks of what they want and of the seconds of a batch, computed beside the training.

    `found` are the flags of a guard on a GPU, which only the device knows.
    """

    def __init__(
        self, wish: Wanted, seconds: float, *, found: torch.Tensor | None, stream: torch.cuda.Stream | None
    ) -> None:
        values = torch.tensor([*map(float, wish), seconds], dtype=torch.float64)
        if found is not None:
            values = values.to(found.device, non_blocking=True)
            values[2] = found.sum()
        self._work = None
        if torch.distributed.is_initialized():
            self._work = torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, async_op=True)
        self._reduced, self._values = values, values  # the first lives until the second has been copied from it
        self._copied: torch.cuda.Event | None = None
        if stream is not None:
            # On another stream: a copy on that of the training would wait for the batches queued there.
            if self._work is None:
                stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                if self._work is not None:
                    self._work.wait()
                self._values = torch.empty(len(values), dtype=torch.float64, pin_memory=True)
                self._values.copy_(values, non_blocking=True)
                self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                self._copied.record()

    def read(self) -> tuple[Wanted, float]:
        """Return both; waits only if the reduction is still running."""
        if self._copied is not None:
            self._copied.synchronize()
        elif self._work is not None:
            self._work.wait()
        stop, save, end, seconds = self._values.tolist()
        return Wanted(int(stop), bool(save), bool(end)), max(seconds, 1e-6)
