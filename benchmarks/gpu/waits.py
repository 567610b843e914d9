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
from benchmarks.gpu.loaders import make_settings, training_loader
from benchmarks.gpu.rates import random_batch
from data.loading.crops import EvaluationCrop
from data.loading.loader import Loader
from data.loading.order import EvaluationPlan
from data.loading.storage import LocalShards
from models.learning.classifier import Classifier
from models.residual import resnet
from pipeline.build.network import build_recipe
from pipeline.cli.compose import compose

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)  # by the host
STEPS = 20
SYNCHRONISES = "synchronizing CUDA operation"  # in torch's warning
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


class SyncRecorder(pl.Callback):
    """Lets torch warn of each wait in the steps of the second epoch, of training and of evaluation."""

    def __init__(self, caught: list[warnings.WarningMessage]) -> None:
        self._caught = caught
        self._before = 0
        self.waits: dict[str, list[warnings.WarningMessage]] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, module: object, batch: object, batch_idx: int) -> None:
        self._begin(trainer, batch_idx)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: object, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self._end(trainer, batch_idx, "training")

    def on_validation_batch_start(self, trainer: pl.Trainer, module: object, batch: object, batch_idx: int) -> None:
        self._begin(trainer, batch_idx)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: object, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self._end(trainer, batch_idx, "evaluation")

    def _begin(self, trainer: pl.Trainer, batch_index: int) -> None:
        if trainer.current_epoch == 1 and batch_index == 0:
            torch.cuda.set_sync_debug_mode("warn")
            self._before = len(self._caught)

    def _end(self, trainer: pl.Trainer, batch_index: int, name: str) -> None:
        if trainer.current_epoch == 1 and batch_index == STEPS - 1:
            self.waits[name] = self._caught[self._before :]
            torch.cuda.set_sync_debug_mode("default")


def check_synchronisations(device: torch.device) -> Answer:
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
        waits = _waits_in_lightning(device)
        counts |= {f"Lightning's {name}": places or 0 for name, places in waits.items()}
        holds &= waits.keys() == {"training", "evaluation"} and not any(waits.values())
    return Answer(holds, counts)


def _waits_in_lightning(device: torch.device) -> dict[str, list[str]]:
    """Where the host waits in an epoch of Lightning's loop with our loaders and a fused optimizer."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recorder = SyncRecorder(caught)
        dataset = samples.make_dataset(Path(folder), 1000)
        index, decode = dataset.index("train"), make_settings(dataset, device)
        loader = training_loader(dataset, device, batch_size=32)
        plan, storage = EvaluationPlan(len(index), 32), LocalShards(dataset.root)
        evaluation = Loader(index, storage, plan=plan, crop=EvaluationCrop(224), decode=decode)
        options: dict[str, Any] = dict.fromkeys(QUIET, False)
        options |= {"limit_train_batches": STEPS, "limit_val_batches": STEPS, "num_sanity_val_steps": 0}
        options |= {"max_epochs": 2, "precision": "bf16-mixed", "callbacks": [recorder]}
        pl.Trainer(accelerator="gpu", devices=1, **options).fit(_classifier(10), loader, evaluation)
    return {
        name: [_place(one) for one in found if SYNCHRONISES in str(one.message)]
        for name, found in recorder.waits.items()
    }


def _place(warning: warnings.WarningMessage) -> str:
    path = Path(warning.filename)
    return f"{path.parent.name}/{path.name}:{warning.lineno}"


def _classifier(num_classes: int) -> Classifier:
    net = resnet("resnet18", num_classes=num_classes, image_size=32)
    return Classifier(net, num_classes=num_classes, recipe=build_recipe(compose("train", ["+model=resnet"])))


CHECKS = (Check("synchronisations", "no step waits for a value", 120, check_synchronisations),)
