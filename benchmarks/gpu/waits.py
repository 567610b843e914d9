"""Waits of the host for values on the device, each of which costs a GPU its queue."""

import tempfile
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.gpu import samples
from benchmarks.gpu.checks import Answer, Check
from benchmarks.gpu.loaders import make_settings, training_loader
from benchmarks.gpu.rates import random_batch
from data.augment.augmentation import Augmentation
from data.augment.crops import EvaluationCrop
from data.loading.loader import Loader
from data.loading.order import EvaluationPlan
from data.storage.local import LocalShards
from models.learning.classifier import Classifier
from models.residual import resnet
from pipeline.build.network import build_recipe
from pipeline.cli.compose import compose
from pipeline.train.callbacks.divergence import GuardFinite
from pipeline.train.callbacks.seeding import SeedEachBatch

STEPS = 20
SYNCHRONISES = "synchronizing CUDA operation"  # in torch's warning
QUIET = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")


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
    """S3: values that the host reads in 20 steps of training and of evaluation; on a GPU also by Lightning's loop."""
    module = _classifier(10).to(device)
    module.batch_key = 0
    found: dict[str, object] = {}
    with _without_values(device):
        images, labels, names = random_batch(8, device, side=32)
        batch = (images, labels % 10, names)
        for name, step in (("training", module.training_step), ("evaluation", module.validation_step)):
            found[name] = _first_read(step, batch)
    if device.type == "cuda":
        waits = _waits_in_lightning(device)
        found |= {f"Lightning's {name}": waits.get(name, "not run") or "none" for name in ("training", "evaluation")}
    return Answer(all(one == "none" for one in found.values()), found)


def _without_values(device: torch.device) -> AbstractContextManager[object]:
    """On a CPU tensors that have no values, of which a read is an error; on a GPU CUDA says so."""
    return FakeTensorMode(allow_non_fake_inputs=True) if device.type == "cpu" else nullcontext()


def _first_read(step: Callable[[object, int], object], batch: tuple[Tensor, ...]) -> str:
    if batch[0].is_cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(STEPS):
            step(batch, number)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        if batch[0].is_cuda:
            torch.cuda.set_sync_debug_mode("default")
    return "none"


def _waits_in_lightning(device: torch.device) -> dict[str, list[str]]:
    """Where the host waits in an epoch of Lightning's loop with our loaders and a fused optimizer."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recorder = SyncRecorder(caught)
        dataset = samples.make_dataset(Path(folder), 36 * STEPS)  # 648 of them to train on
        decode = make_settings(dataset, device)
        loader = training_loader(dataset, device, batch_size=32)  # whose epoch has STEPS batches
        plan, storage = EvaluationPlan(len(dataset.index("val")), 3), LocalShards(dataset.root)
        evaluation = Loader(
            dataset.index("val"), storage, plan=plan, augment=Augmentation(EvaluationCrop(224)), decode=decode
        )
        options: dict[str, Any] = dict.fromkeys(QUIET, False)
        options |= {"limit_val_batches": STEPS, "num_sanity_val_steps": 0}
        guard = GuardFinite("stop", data=SimpleNamespace(), report=print)  # the data only names samples
        options |= {"max_epochs": 2, "precision": "bf16-mixed", "callbacks": [SeedEachBatch(0), recorder, guard]}
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
    return Classifier(
        net, num_classes=num_classes, recipe=build_recipe(compose("train", ["+model=resnet", "mix=mixup_cutmix"]))
    )


CHECKS = (Check("synchronisations", "no step waits for a value", 120, check_synchronisations),)
