"""Stop several ranks at the same step after a signal to any of them."""

import os
import signal
import time
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed

from data.children import PARENT

SECONDS_BETWEEN_READINGS = 0.5


class StopTogether(pl.Callback):
    """Reduce a flag over the ranks about twice a second, so that no step waits for it.

    Lightning broadcasts a flag and reads it back before every batch (its issue 21487), and broadcasts inside its signal
    handler, where other ranks may be in another collective. Here a signal sets a flag. A reduction of the flags starts
    after one batch and is read after a later one; how many batches later is part of the reduction, so all ranks agree.
    With one rank Lightning's own way needs no communication and stays.
    """

    def __init__(self) -> None:
        self._is_signalled = False
        self._interval, self._batches = 1, 0  # batches between a start and its reading; since the last start
        self._pending: _Reduction | None = None
        self._since = 0.0
        self._stream: torch.cuda.Stream | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace Lightning's flag, and its reaction to SIGTERM before it registers that."""
        os.environ.pop(PARENT, None)  # Lightning has started its ranks; what callbacks start may outlive this process
        if trainer.world_size == 1:
            return
        if pl_module.device.type == "cuda":
            self._stream = torch.cuda.Stream(pl_module.device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        epoch_loop: Any = trainer.fit_loop.epoch_loop  # whose methods are replaced
        epoch_loop._broadcast_sigterm_tensor = lambda: None
        launcher = trainer.strategy.launcher

        def remember(number: int, frame: FrameType | None) -> None:
            if launcher is not None and not self._is_signalled:
                launcher.kill(signal.Signals(number))  # processes that this one has started
            self._is_signalled = True

        connector: Any = trainer._signal_connector
        connector._sigterm_notifier_fn = remember

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: object) -> None:
        """Read the reduction that is due, and start the next."""
        if trainer.world_size == 1:
            return
        self._batches += 1
        if self._pending is not None and self._batches >= self._interval:
            is_signalled, seconds = self._pending.read()
            self._pending = None
            self._interval = max(1, int(SECONDS_BETWEEN_READINGS / seconds))
            if is_signalled:  # Lightning ends the training after this batch, on every rank
                trainer._signal_connector.received_sigterm = True
        if self._pending is None:
            now = time.perf_counter()
            seconds, self._since = (now - self._since) / self._batches, now
            self._pending = _Reduction(self._is_signalled, seconds, device=pl_module.device, stream=self._stream)
            self._batches = 0

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the reduction in flight."""
        if self._pending is not None:
            self._pending.read()
            self._pending = None


class _Reduction:
    """The maximum over all ranks of a flag and of the seconds of a batch, computed beside the training."""

    def __init__(
        self, is_signalled: bool, seconds: float, *, device: torch.device, stream: torch.cuda.Stream | None
    ) -> None:
        values = torch.tensor([float(is_signalled), seconds], dtype=torch.float64).to(device, non_blocking=True)
        self._work = torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, async_op=True)
        self._reduced, self._values = values, values  # the first lives until the second has been copied from it
        self._copied: torch.cuda.Event | None = None
        if stream is not None:
            # On another stream: a copy on that of the training would wait for the batches queued there.
            with torch.cuda.stream(stream):
                self._work.wait()
                self._values = torch.empty(2, dtype=torch.float64, pin_memory=True).copy_(values, non_blocking=True)
                self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                self._copied.record()

    def read(self) -> tuple[bool, float]:
        """Return both; waits only if the reduction is still running."""
        if self._copied is None:
            self._work.wait()
        else:
            self._copied.synchronize()
        is_signalled, seconds = self._values.tolist()
        return bool(is_signalled), max(seconds, 1e-6)
