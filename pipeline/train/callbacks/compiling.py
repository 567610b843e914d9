"""`torch.compile` for the network of a training."""

import os
import shutil
import time

import pytorch_lightning as pl
from rich.console import Console

from models.arguments import require
from models.learning.classifier import Classifier
from pipeline.cli.console import print_line
from pipeline.cli.errors import config_keys_in_errors

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # of torch.compile


def check_mode(mode: bool | str) -> None:
    """Raise ValueError unless `mode` is True or a mode of `torch.compile`."""
    require(mode is True or mode in MODES, f"is not true, null or one of {', '.join(MODES)}", compile=mode)


def compile_network(module: Classifier, mode: bool | str) -> None:
    """Let torch compile the network when its first batch arrives.

    True is torch's default mode. Raises: ValueError for an unknown mode, and without a compiler.
    """
    check_mode(mode)
    compiler = os.environ.get("CXX", "g++")
    found = module.device.type != "cpu" or shutil.which(compiler) is not None
    shown = "true" if mode is True else mode
    require(found, f"needs a C++ compiler, and there is no {compiler}: set CXX to one", compile=shown)
    module.net.compile(mode="default" if mode is True else str(mode))


class CompileNetwork(pl.Callback):
    """Compile the network before the first batch, and print how long that took.

    Names of tensors and modules stay. Raises: ValueError for an unknown mode.
    """

    def __init__(self, mode: bool | str, console: Console) -> None:
        check_mode(mode)
        self.mode, self.console = mode, console
        self._began: float | None = None
        self._is_timed = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compile the network. Raises: ValueError for an unknown mode, and without a compiler."""
        assert isinstance(pl_module, Classifier)
        with config_keys_in_errors({"compile": "trainer.compile"}):
            compile_network(pl_module, self.mode)

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
