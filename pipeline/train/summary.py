"""A training, ready to go, and what is said of it before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray

from data.loading.datamodule import ShardData
from models.analysis.report import Report
from models.learning.classifier import Classifier
from pipeline.cli.console import main_console, print_facts
from pipeline.report.measure import TABLE, Training, report_on, with_effective_field, write
from pipeline.report.sample_images import photographs
from pipeline.runs.run import METRICS, Run, Values
from pipeline.tracking.tracker import Tracker

FIELDS = "receptive_field"  # the folder of the report, in a run's own and among its artifacts
LOOKED_AT = 4  # photographs over which the effective field is averaged
LARGEST = 2 * 2**30  # bytes of activations of one image up to which a training measures it first


@dataclass(frozen=True)
class Job:
    """A training, ready to go: `values` are those of the config, by dotted key."""

    module: Classifier
    data: ShardData
    run: Run
    tracker: Tracker
    values: Values

    @property
    def name(self) -> str:
        """The network's: its variant, or the function that builds it."""
        return str(self.values.get("model.variant", self.values["model._target_"]))

    @property
    def num_parameters(self) -> int:
        """Parameters of the network."""
        return sum(parameter.numel() for parameter in self.module.net.parameters())


def banner(job: Job, trainer: pl.Trainer) -> dict[str, str]:
    """What is about to run, by name."""
    dataset, feeding = job.data.dataset, job.data.feeding
    splits = ", ".join(f"{name} {split.samples:,}" for name, split in dataset.splits.items())
    device = trainer.strategy.root_device
    device_name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    accumulate = f" x {feeding.accumulate} accumulated" if feeding.accumulate > 1 else ""
    plan, steps = job.data.training_plan(0, trainer.world_size), trainer.max_steps // job.module.recipe.epochs
    rest = dataset.splits["train"].samples - steps * plan.global_batch_size
    return {
        "model": f"{job.name}, {job.num_parameters:,} parameters",
        "data": f"{dataset.name}: {splits}, {len(dataset.classes)} classes, {job.data.training_view.image_size} pixels",
        "evaluation": evaluated(job.data) if job.data.evaluation_split else "none: there is no split val or test",
        "batch": f"{trainer.world_size} x {feeding.batch_size}{accumulate} on {device_name}",
        "precision": f"{trainer.precision}, channels_last",
        "steps": f"{trainer.max_steps:,} in {job.module.recipe.epochs} epochs"
        f", which leave {rest:,} images out, others each time{rising(job)}",
    }


def rising(job: Job) -> str:
    """A warning where the learning rate only rises, because the warm-up is as long as the training."""
    warmup = job.values.get("recipe.schedule.warmup_epochs", 0)
    if warmup < job.module.recipe.epochs:
        return ""
    return f"; the learning rate rises to the end: recipe.schedule.warmup_epochs={warmup}"


def places(job: Job) -> dict[str, str]:
    """Where the run is kept and shown."""
    run, link = job.run, job.tracker.link
    resumed = f" (goes on from {run.last_checkpoint.name})" if run.last_checkpoint is not None else ""
    return {"folder": f"{run.folder}{resumed}", "dashboard": link or "none"}


def end(job: Job, result: Mapping[str, Any]) -> dict[str, str]:
    """The best metric, the checkpoint, and what to type next."""
    score, link = result["val/top1"], job.tracker.link
    best = {} if score is None else {"best val/top1": f"{score:.4f} of {evaluated(job.data)}"}
    following = "make ui" if link is not None and link.endswith("(make ui)") else f"tail {job.run.folder / METRICS}"
    return {**best, "checkpoint": result["checkpoint"], "next": following}


def evaluated(data: ShardData) -> str:
    """What an evaluation counts."""
    return f"{data.num_evaluation_images:,} images of split {data.evaluation_split}"


def keep_report(job: Job, trainer: pl.Trainer) -> None:
    """Show on the dashboard what the network sees and costs; one that cannot be followed is trained all the same."""
    if job.tracker.link is None:
        return
    try:
        found, photograph = look_at(job, precision=str(trainer.precision))
    except ValueError as error:
        main_console().print(f"no report: {error}", highlight=False, markup=False, soft_wrap=True)
        job.tracker.log({"params_millions": job.num_parameters / 1e6}, 0)
        return
    job.tracker.log(found.facts, 0)
    job.tracker.keep(write(found, job.run.folder / FIELDS, photograph=photograph)[0], FIELDS)
    job.tracker.tabulate(found.table(), f"{FIELDS}/{TABLE}")


def look_at(job: Job, *, precision: str) -> tuple[Report, NDArray[np.uint8] | None]:
    """The report of the network with the weights that the training begins with, and a photograph that it was shown.

    Raises: ValueError for a network that cannot be followed.
    """
    net, size, file = job.module.net, job.data.training_view.image_size, job.values.get("weights.file")
    training = Training(job.data.feeding.batch_size, precision, job.module.recipe.optimizer)
    found = report_on(net, job.name, image=(3, size, size), training=training)
    if found.memory.activations > LARGEST * found.batch_size:
        print_facts(main_console(), {"report": "without the effective field, which would take gigabytes here"})
        return found, None
    shown = photographs(None, LOOKED_AT, size=(size, size))
    weights = None if file is None else f"weights of {file}"
    return with_effective_field(found, net, shown=shown, weights=weights), shown.pixels[0]
