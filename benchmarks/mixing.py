"""The cost of mixing images and averaging weights over the same training step without: ResNet-18 at 32x32, batch 128.

    python -m benchmarks.mixing            60 steps of each kind

The kinds take turns step by step in one training, so that all have the same minutes of the machine. The last column is
the mixing of a batch alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from itertools import cycle

import pytorch_lightning as pl
import torch

from benchmarks.step import RECIPE, WARMUP_STEPS, Batches, now, resnet18
from models.learning.averaging import AveragedWeights, Averaging
from models.learning.classifier import Classifier
from models.learning.recipe import Recipe
from pipeline.build.network import build_recipe
from pipeline.build.trainer import choose_precision
from pipeline.cli.compose import choices, compose
from pipeline.train.callbacks.seeding import SeedEachBatch
from pipeline.train.fit import prepare_process

AVERAGED = ", averaging=ema"
KINDS = ("none", *(one for one in choices("mix") if one != "none"), "none" + AVERAGED, "mixup" + AVERAGED)
QUIET = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")


class Turns(pl.Callback):
    """Lets each step mix in another way, with averaged weights or not, and measures its wall and CPU milliseconds."""

    def __init__(self, average: AveragedWeights) -> None:
        self.average = average
        self.recipes = {kind: _recipe(kind) for kind in KINDS}
        self.kinds = cycle(KINDS)
        self.times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: object) -> None:
        """Choose the recipe and read the clocks."""
        self.kind = next(self.kinds)
        pl_module.recipe = self.recipes[self.kind]
        pl_module.average = self.average if self.kind.endswith(AVERAGED) else None
        self.start = now()

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: object) -> None:
        """Read the clocks again."""
        if trainer.global_step > WARMUP_STEPS:
            wall, cpu = (1000 * (end - start) for start, end in zip(self.start, now(), strict=True))
            self.times[self.kind].append((wall, cpu))


def _recipe(kind: str) -> Recipe:
    return build_recipe(compose("train", [*RECIPE, f"mix={kind.removesuffix(AVERAGED)}"]))


def milliseconds_alone(kind: str, batches: Batches) -> float:
    """CPU time of mixing a batch, the median of 200; on a GPU that of the host."""
    mixing, times = _recipe(kind).mix, []
    for key in range(200 if mixing is not None else 0):
        start = time.process_time()
        mixing.mix_batch(batches.images[0], batches.labels, num_classes=10, key=key)
        times.append(1000 * (time.process_time() - start))
    return statistics.median(times or [0.0])


def main() -> None:
    """Train, and print the medians and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of each kind")
    steps = parser.parse_args().steps
    num_steps = WARMUP_STEPS + len(KINDS) * steps
    prepare_process(seed=0)
    warnings.filterwarnings("ignore")
    accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    device = torch.device("cuda" if accelerator == "gpu" else "cpu")
    net, precision = resnet18(), choose_precision("auto", accelerator)
    module = Classifier(net, num_classes=10, recipe=_recipe("none"))
    average = module.average = AveragedWeights(net, Averaging())
    turns = Turns(average)
    options = {"accelerator": accelerator, "devices": 1, "precision": precision, "max_steps": num_steps}
    trainer = pl.Trainer(max_epochs=-1, callbacks=[SeedEachBatch(0), turns], **options, **dict.fromkeys(QUIET, False))
    batches = Batches(num_steps, 128, log_every=num_steps, device=device)
    trainer.fit(module, batches)
    columns = f"{'mix':<22}{'wall ms':>9}{'ratio':>8}{'CPU ms':>9}{'ratio':>8}{'alone':>8}"
    print(f"{columns}   {precision}, {torch.get_num_threads()} threads, medians of {steps}")
    for kind, times in turns.times.items():
        line = f"{kind:<22}"
        for clock in range(2):
            mine, its = (statistics.median(one[clock] for one in each) for each in (times, turns.times["none"]))
            line += f"{mine:>9.2f}{mine / its:>8.3f}"
        print(f"{line}{milliseconds_alone(kind, batches):>8.2f}")


if __name__ == "__main__":
    main()
