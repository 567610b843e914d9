"""A classifier that fails on one rank at one step, in the way that the variable FAIL says: `rank,step,how`."""

from __future__ import annotations

import errno
import math
import os
import signal
import threading

from torch import Tensor

from models.learning.classifier import Classifier

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class Failing(Classifier):
    """Fails in a training step, or has a loss or gradient there that is not finite. Shapes: (N, C, H, W) -> (N, K)."""

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_index: int) -> Tensor:
        rank, step, how = os.environ["FAIL"].split(",")
        if (self.global_rank, self.global_step) == (int(rank), int(step)):
            self.fail(how)
        loss = super().training_step(batch, batch_index)
        if (self.global_rank, self.global_step) != (int(rank), int(step)):
            return loss
        if how == "gradient":
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss + {"nan": math.nan, "inf": math.inf}.get(how, 0)

    def fail(self, how: str) -> None:
        """Raise, end, stop or wait."""
        if how == "value":
            raise ValueError("an image of ours")
        if how == "bug":
            raise RuntimeError("a bug of ours")
        if how == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if how == "exit":
            os._exit(7)
        if how == "sleep":
            threading.Event().wait(1000)
        if how in SIGNALS:
            os.kill(os.getpid(), SIGNALS[how])
