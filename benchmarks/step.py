"""The cost of the training loop over a bare PyTorch loop with the same network, precision and batches, interleaved.

    python -m benchmarks.step              5 rounds each of ResNet-18 at 32x32 and LeNet-5

Ours is the loop of `train`: Lightning, the Classifier, and all callbacks. "Unguarded" is that without the callbacks
that check for values that are not finite, stop and save: only seeds, and progress with its journal. "Averaged" is ours
with a moving average of the weights. The bare loop does
forward, backward, optimizer and schedule and reads the loss as often. All use the same tensors in memory, so no loader
is measured, and start from the same weights. benchmarks/checkpoint.py measures a save.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytorch_lightning as pl
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional

from data.loading.loader import Batch, TrainingLoader
from data.loading.order import Position, TrainingPlan
from models.learning.averaging import AveragedWeights, Averaging
from models.learning.classifier import Classifier
from models.learning.recipe import Recipe
from models.learning.schedules import cosine
from models.residual import resnet
from pipeline.build.network import build_recipe
from pipeline.build.trainer import choose_precision
from pipeline.cli.compose import compose
from pipeline.cli.signals import StopSignals
from pipeline.runs.checkpoint_writer import CheckpointWriter
from pipeline.runs.run import Run
from pipeline.train.callbacks.divergence import GuardFinite
from pipeline.train.callbacks.progress import ProgressCallback
from pipeline.train.callbacks.ranks import RankWatch
from pipeline.train.callbacks.saving import SaveCheckpoints
from pipeline.train.callbacks.seeding import SeedEachBatch
from pipeline.train.callbacks.stopping import StopTogether
from pipeline.train.fit import prepare_process

WARMUP_STEPS = 10
# The recipe of `train`; `optimizer` and `schedule` are the same without configs.
RECIPE = (
    *("+model=resnet", "loss=cross_entropy", "recipe.epochs=1"),
    *("recipe.optimizer.lr=0.01", "recipe.warmup_epochs=0.1"),
)


def resnet18() -> nn.Module:
    """ResNet-18 with the stem for small images."""
    return resnet("resnet18", num_classes=10, image_size=32)


def lenet() -> nn.Module:
    """LeNet-5 of LeCun et al. 1998 with ReLU and max pooling, three channels."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


class Batches(TrainingLoader):
    """A few random batches, repeated. Only what a training without checkpoints reads of a loader."""

    wait_seconds, position = 0.0, Position(0, 0)

    def __init__(self, num_steps: int, batch_size: int, *, log_every: int, device: torch.device) -> None:
        self.num_steps, self.batch_size, self.log_every = num_steps, batch_size, log_every
        generator = torch.Generator().manual_seed(0)
        images = [torch.randn(batch_size, 3, 32, 32, generator=generator) for _ in range(8)]
        self.images = [image.to(device, memory_format=torch.channels_last) for image in images]
        self.labels = torch.randint(10, (batch_size,), generator=generator).to(device)

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.num_steps):
            yield Batch(self.images[step % 8], self.labels, self.labels)


class Clock(pl.Callback):
    """The times at which step WARMUP_STEPS and the last step ended."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: object) -> None:
        """Read the clock at both steps."""
        if trainer.global_step in (WARMUP_STEPS, trainer.max_steps):
            self.marks.append(now())


def ours(
    net: nn.Module, batches: Batches, *, precision: str, accelerator: str, guarded: bool = True, averaged: bool = False
) -> list[tuple[float, float]]:
    """Wall and CPU time at the two marks of the training loop of `train`."""
    recipe = build_recipe(compose("train", RECIPE))
    module = Classifier(net, num_classes=10, recipe=recipe)
    module.average = AveragedWeights(module.net, Averaging()) if averaged else None
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        size = batches.batch_size
        plan = TrainingPlan((size,), seed=0, shuffle_window=1, batch_size=size)
        data = SimpleNamespace(training_plan=lambda *_: plan, images_per_step=lambda _: size)
        options = {"data": data, "log_every": batches.log_every}
        progress = ProgressCallback(Console(quiet=True), run.journal.record, num_epochs=1, **options)
        clock, own = Clock(), list[pl.Callback]()
        if guarded:
            guard = GuardFinite("stop", data=options["data"], report=print)
            saving = SaveCheckpoints(run.checkpoints, run.journal, guard=guard, monitor=None)
            watch = RankWatch(run.folder, dict, rank=0, hang_seconds=600, close=print)
            watch.start()
            own = [watch, guard, StopTogether(saving, guard, signals=StopSignals(), every_minutes=10), saving]
        trainer = pl.Trainer(
            accelerator=accelerator,
            devices=1,
            precision=precision,
            max_epochs=-1,
            max_steps=len(batches),
            callbacks=[SeedEachBatch(0), progress, clock, *own],
            plugins=[CheckpointWriter(run.checkpoints)],
            logger=False,
            enable_checkpointing=guarded,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, batches)
        if guarded:
            watch.leave()
    return clock.marks


def bare(net: nn.Module, batches: Batches, *, precision: str, accelerator: str) -> list[tuple[float, float]]:
    """Wall and CPU time at the two marks of a minimal loop."""
    device = batches.labels.device
    net = net.to(device, memory_format=torch.channels_last)
    decayed = [parameter for parameter in net.parameters() if parameter.ndim > 1]
    free = [parameter for parameter in net.parameters() if parameter.ndim <= 1]
    sgd = optimizer([{"params": decayed}, {"params": free, "weight_decay": 0.0}])
    steps = len(batches)
    recipe = Recipe(1, optimizer, cosine, warmup_epochs=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        sgd, partial(recipe.lr_factor, steps_per_epoch=steps, num_steps=steps)
    )
    marks = []
    for step, (images, labels, _) in enumerate(batches, start=1):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = functional.cross_entropy(net(images), labels)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        scheduler.step()
        if step % batches.log_every == 0:
            loss.item()
        if step in (WARMUP_STEPS, steps):
            marks.append(now())
    return marks


def optimizer(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    """SGD as in `RECIPE`."""
    return torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)


def now() -> tuple[float, float]:
    """Wall and CPU seconds, after the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def compare(
    name: str, build: Callable[[], nn.Module], *, batch_size: int, num_steps: int, log_every: int, rounds: int
) -> None:
    """Alternate all four and print the medians."""
    accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    batches = Batches(
        num_steps, batch_size, log_every=log_every, device=torch.device("cuda" if accelerator == "gpu" else "cpu")
    )
    precision = choose_precision("auto", accelerator)
    variants = {"averaged": partial(ours, averaged=True), "unguarded": partial(ours, guarded=False)}
    contenders = {"ours": ours, **variants, "bare": bare}
    measured: dict[str, list[tuple[float, float]]] = {contender: [] for contender in contenders}
    for turn in range(rounds):
        # The order alternates, so that a machine that warms up or slows down favours none.
        for contender in list(contenders)[:: -1 if turn % 2 else 1]:
            torch.manual_seed(0)
            start, end = contenders[contender](build(), batches, precision=precision, accelerator=accelerator)
            steps = num_steps - WARMUP_STEPS
            measured[contender].append((1000 * (end[0] - start[0]) / steps, 1000 * (end[1] - start[1]) / steps))
    for kind, unit in enumerate(("wall", "CPU")):
        times = {contender: [one[kind] for one in rounds] for contender, rounds in measured.items()}
        medians = "".join(f"{statistics.median(one):>11.2f}" for one in times.values())
        pairs = (("ours", "unguarded"), ("ours", "bare"), ("averaged", "ours"))
        versus = [
            statistics.median(mine / its for mine, its in zip(times[one], times[other], strict=True))
            for one, other in pairs
        ]
        extra = statistics.median(mine - its for mine, its in zip(times["ours"], times["bare"], strict=True))
        ratios = "".join(f"{one:>14.3f}" for one in versus)
        line = f"{name:<10}{batch_size:>6}  {precision:<11}{unit:<5}{medians}{ratios}{extra:>+10.2f}"
        print(f"{line}   medians of {len(times['bare'])}")


def main() -> None:
    """Both networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    prepare_process(seed=0)
    warnings.filterwarnings("ignore")
    names = f"{'ours':>11}{'averaged':>11}{'unguarded':>11}{'bare':>11}"
    names += f"{'to unguarded':>14}{'to bare':>14}{'averaged to':>14}{'extra':>10}"
    print(f"{'network':<10}{'batch':>6}  {'precision':<11}{'ms':<5}{names}")
    compare("lenet", lenet, batch_size=32, num_steps=1010, log_every=50, rounds=rounds)
    compare("resnet18", resnet18, batch_size=128, num_steps=60, log_every=10, rounds=rounds)


if __name__ == "__main__":
    main()
