"""For how long a checkpoint delays a training: the same steps with and without saves, interleaved.

    python -m benchmarks.checkpoint        ResNet-50 with momentum (205 MB), 5 rounds

A save copies the state to host memory; a thread writes it, while the training continues with the cores that are left.
The delay is the difference of both times divided by the number of saves. The first save of a training also allocates
the copy; it is given apart.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch

from benchmarks.step import RECIPE, Batches, now
from models.learning.classifier import Classifier
from models.residual import resnet
from pipeline.build.network import build_recipe
from pipeline.build.trainer import choose_precision
from pipeline.cli.compose import compose
from pipeline.runs.checkpoint_writer import CheckpointWriter
from pipeline.runs.run import Run
from pipeline.train.callbacks.divergence import GuardFinite
from pipeline.train.callbacks.loop_state import Point
from pipeline.train.callbacks.saving import SaveCheckpoints
from pipeline.train.fit import prepare_process

FIRST, SAVES = 4, 4  # steps before the first save; saves
BETWEEN = 100 if torch.cuda.is_available() else 6  # steps from one save to the next, which has to find it written


class Times(pl.Callback):
    """The times after each step, and for how long each save held up the loop; saves unless `saves` is false."""

    def __init__(self, saving: SaveCheckpoints, *, saves: bool) -> None:
        self.saving, self.saves = saving, saves
        self.steps: list[float] = []
        self.held: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: object) -> None:
        """Save where it is due, and read the clock."""
        if self.saves and trainer.global_step >= FIRST and (trainer.global_step - FIRST) % BETWEEN == 0:
            start = now()[0]
            self.saving.save(trainer, Point.BATCH)
            self.held.append(time.perf_counter() - start)
        self.steps.append(now()[0])


def train(*, saves: bool, batch_size: int) -> Times:
    """Train FIRST + SAVES * BETWEEN steps."""
    accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    device, num_steps = torch.device("cuda" if accelerator == "gpu" else "cpu"), FIRST + SAVES * BETWEEN
    batches = Batches(num_steps, batch_size, log_every=1000, device=device)
    torch.manual_seed(0)
    module = Classifier(
        resnet("resnet50", num_classes=1000, image_size=32),
        num_classes=1000,
        recipe=build_recipe(compose("train", RECIPE)),
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        guard = GuardFinite("stop", data=batches, report=print)
        saving = SaveCheckpoints(run.checkpoints, run.journal, guard=guard, monitor=None)
        times = Times(saving, saves=saves)
        trainer = pl.Trainer(
            accelerator=accelerator,
            devices=1,
            precision=choose_precision("auto", accelerator),
            max_epochs=-1,
            max_steps=num_steps,
            callbacks=[guard, times, saving],
            plugins=[CheckpointWriter(run.checkpoints)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, batches)
    return times


def main() -> None:
    """Interleave both, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    prepare_process(seed=0)
    warnings.filterwarnings("ignore")
    delays, firsts, helds = list[float](), list[float](), list[float]()
    for turn in range(options.rounds):
        order = (True, False) if turn % 2 else (False, True)
        runs = {saves: train(saves=saves, batch_size=options.batch_size) for saves in order}
        # From the step before the first save, to the one before the second, to the last.
        marks = {
            saves: [run.steps[step] for step in (FIRST - 2, FIRST - 2 + BETWEEN, -1)] for saves, run in runs.items()
        }
        seconds = {saves: (one[1] - one[0], one[2] - one[1]) for saves, one in marks.items()}
        first, rest = (mine - its for mine, its in zip(seconds[True], seconds[False], strict=True))
        firsts.append(first)
        delays.append(rest / (SAVES - 1))
        helds.append(statistics.median(runs[True].held[1:]))
        print(
            f"round {turn + 1}: first save {first:+.3f} s, each later one {delays[-1]:+.3f} s, of which the loop "
            f"waited {helds[-1]:.3f} s (the first {runs[True].held[0]:.3f} s)"
        )
    medians = [statistics.median(one) for one in (firsts, delays, helds)]
    print("medians: first save {:+.3f} s, each later one {:+.3f} s, waited {:.3f} s".format(*medians))


if __name__ == "__main__":
    main()
