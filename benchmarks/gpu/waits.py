"""Waits of the host for values on the device, each of which costs a GPU its queue."""

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import samples
from benchmarks.gpu.checks import Answer, Check
from benchmarks.gpu.loaders import training_loader
from benchmarks.gpu.rates import random_batch
from models.learning.classifier import Classifier
from models.residual import resnet
from pipeline.build.network import build_recipe
from pipeline.cli.compose import compose

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)  # by the host
STEPS = 20
QUIET = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")


class Readings(TorchDispatchMode):
    """Counts the values that the host reads from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        self.count += func in READS
        return func(*args, **(kwargs or {}))


class Warned(pl.Callback):
    """Lets torch warn of each wait in the second epoch, from its first batch's start to its last batch's end."""

    def __init__(self, caught: list[warnings.WarningMessage]) -> None:
        self._caught = caught
        self._before = 0
        self.waits: list[warnings.WarningMessage] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.current_epoch == 1 and trainer.fit_loop.epoch_loop.batch_idx == 0:
            torch.cuda.set_sync_debug_mode("warn")
            self._before = len(self._caught)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.current_epoch == 1 and trainer.fit_loop.epoch_loop.batch_idx == STEPS - 1:
            self.waits = self._caught[self._before :]
            torch.cuda.set_sync_debug_mode("default")


def synchronisations(device: torch.device) -> Answer:
    """S3: values that are read in 20 steps of training and of evaluation; on a GPU also by Lightning's loop."""
    num_classes = 10 if device.type == "cuda" else 5  # on a CPU `one_hot`, for the top 5, reads values
    module = _classifier(num_classes).to(device)
    images, labels, names = random_batch(8, device, side=32)
    batch = (images, labels % num_classes, names)
    counts: dict[str, object] = {}
    for name, step in (("training", module.training_step), ("evaluation", module.validation_step)):
        with Readings() as readings:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            for number in range(STEPS):
                step(batch, number)
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        counts[name] = readings.count
    holds = not any(counts.values())
    if device.type == "cuda":
        found = _in_lightning(device)
        counts |= {"Lightning's loop": len(found), "where": sorted(set(found))[:5]}
        holds &= not found
    return Answer(holds, counts)


def _in_lightning(device: torch.device) -> list[str]:
    """Where the host waits in an epoch of Lightning's loop with the loader and a fused optimizer."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warned = Warned(caught)
        loader = training_loader(samples.make_dataset(Path(folder), 1000), device, batch_size=32)
        options: dict[str, Any] = dict.fromkeys(QUIET, False)
        options |= {"limit_train_batches": STEPS, "max_epochs": 2, "precision": "bf16-mixed", "callbacks": [warned]}
        pl.Trainer(accelerator="gpu", devices=1, **options).fit(_classifier(10), loader)
    waits = [one for one in warned.waits if "synchronizing CUDA operation" in str(one.message)]
    return [f"{Path(one.filename).parent.name}/{Path(one.filename).name}:{one.lineno}" for one in waits]


def _classifier(num_classes: int) -> Classifier:
    net = resnet("resnet18", num_classes=num_classes, image_size=32)
    return Classifier(net, num_classes=num_classes, recipe=build_recipe(compose("train", ["+model=resnet"])))


CHECKS = (Check("synchronisations", "no step waits for a value", 90, synchronisations),)
