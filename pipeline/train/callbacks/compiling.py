"""`torch.compile` for the network of a training."""

import os
import shutil
import time

import pytorch_lightning as pl
from rich.console import Console

from models.arguments import require
from models.learning.classifier import Classifier
from pipeline.cli.console import print_line

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # of torch.compile


class CompileNetwork(pl.Callback):
    """Compile the network before the first batch, and print how long that took.

    `mode` is True or a mode of `torch.compile`. Names of tensors and modules stay. Raises: ValueError for another mode.
    """

    def __init__(self, mode: bool | str, console: Console) -> None:
        require(mode is True or mode in MODES, f"is not true, null or one of {', '.join(MODES)}", compile=mode)
        self.mode, self.console = "default" if mode is True else str(mode), console
        self._began: float | None = None
        self._is_timed = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compile the network; torch does the work when the first batch arrives. Raises: ValueError."""
        assert isinstance(pl_module, Classifier)
        compiler = os.environ.get("CXX", "g++")
        if pl_module.device.type == "cpu" and shutil.which(compiler) is None:
            mode = "true" if self.mode == "default" else self.mode
            raise ValueError(f"trainer.compile={mode} needs a C++ compiler, and there is no {compiler}: set CXX to one")
        pl_module.net.compile(mode=self.mode)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Start the clock at the first batch."""
        if self._began is None:
            self._began = time.perf_counter()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: object) -> None:
        """Print the time of the first forward and backward, which are compiled in it."""
        if not self._is_timed and self._began is not None:
            seconds = time.perf_counter() - self._began
            print_line(self.console, f"compiled    in {seconds:.0f} s, with the first batch")
            self._is_timed = True
