"""The summaries that a training prints before its first step and after its last."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch

from data.loading.datamodule import ShardData
from data.loading.decoder import DecoderChoice
from pipeline.build.trainer import no_gpu_reason
from pipeline.cli.console import main_console
from pipeline.runs.run import Run
from pipeline.train.job import Job


def run_header(job: Job, trainer: pl.Trainer, *, decoder: DecoderChoice) -> dict[str, str]:
    """Return the settings and places of a run by name."""
    dataset, settings = job.data.dataset, job.data.settings
    splits = ", ".join(f"{name} {split.samples:,}" for name, split in dataset.splits.items())
    device = trainer.strategy.root_device
    is_gpu = device.type == "cuda"
    on_cpu = f"CPU, {torch.get_num_threads()} threads{unusable_gpu()}"
    device_name = torch.cuda.get_device_name(device) if is_gpu else on_cpu
    accumulate = f" x {settings.accumulate} accumulated" if settings.accumulate > 1 else ""
    folder, last = job.run.folder, job.run.last_checkpoint
    image_size, link, command = job.data.training_crop.image_size, job.tracker.link, job.tracker.command
    share = job.data.core_share(trainer.num_devices)
    return {
        "model": f"{job.settings.network}, {job.num_parameters:,} parameters",
        "data": f"{dataset.name}: {splits}, {len(dataset.classes)} classes, {image_size} pixels",
        "evaluation": evaluation_images(job.data) if job.data.evaluation_split else "none: no split val or test",
        "batch": f"{trainer.world_size} x {settings.batch_size}{accumulate} on {device_name}",
        "decoding": f"{decoder}; {share.cores} threads a rank ({share.reason})",
        "precision": f"{trainer.precision}, channels_last",
        "steps": describe_steps(job, trainer),
        "folder": f"{folder} (continues from {last.name})" if last else str(folder),
        "dashboard": f"{link}{f' ({command})' if command else ''}" if link else "none",
    }


def unusable_gpu() -> str:
    """Return why torch cannot use the GPU of this machine, nothing where it can or where there is none."""
    reason = "" if torch.cuda.is_available() else no_gpu_reason()
    return reason if "driver" in reason and "no NVIDIA driver" not in reason else ""


def describe_steps(job: Job, trainer: pl.Trainer) -> str:
    """Return the number of steps, how many images each epoch drops, and a warning for a warm-up without an end."""
    recipe, plan = job.module.recipe, job.data.training_plan(0, trainer.world_size)
    steps_per_epoch = trainer.max_steps // recipe.epochs
    dropped = job.data.dataset.splits["train"].samples - steps_per_epoch * plan.global_batch_size
    text = f"{trainer.max_steps:,} in {recipe.epochs} epochs"
    if dropped:
        text += f"; each epoch drops {dropped:,} images, different ones each time"
    if recipe.rises_until_end(steps_per_epoch=steps_per_epoch, num_steps=trainer.max_steps):
        text += "; the learning rate still rises at the last step: lower recipe.schedule.warmup_epochs"
    return text


def run_result(job: Job, result: Mapping[str, Any]) -> dict[str, str]:
    """Return the best metric, the checkpoint and the next command, by name."""
    score, tracker = result["val/top1"], job.tracker
    best = {} if score is None else {"best val/top1": f"{score:.4f} on {evaluation_images(job.data)}"}
    command = tracker.command if tracker.link else None
    return {**best, "checkpoint": result["checkpoint"], "next": command or f"tail {job.run.journal.path}"}


def evaluation_images(data: ShardData) -> str:
    """Return the number of images that an evaluation counts, and their split."""
    return f"{data.num_evaluation_images:,} images of split {data.evaluation_split}"


def print_missing(missing: str | None, run: Run) -> None:
    """Print the dashboard's gaps, and the file that has every point."""
    if missing is not None:
        text = f"{missing}; {run.journal.path} has every point"
        main_console().print(text, highlight=False, soft_wrap=True)
