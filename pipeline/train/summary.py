"""The summaries that a training prints before its first step and after its last."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch

from data.augment.crops import describe_size
from data.loading.datamodule import ShardData
from data.loading.decoder import DecoderChoice
from models.learning.classifier import Classifier
from models.learning.evaluation import TOP1, top1_of
from models.learning.recipe import Recipe
from pipeline.build.trainer import no_gpu_reason
from pipeline.cli.console import main_console, print_line
from pipeline.runs.checkpoints import Checkpoint
from pipeline.runs.run import Run
from pipeline.train.callbacks.early_stopping import StopEarly
from pipeline.train.callbacks.saving import SaveCheckpoints
from pipeline.train.job import Job

# Parameters an image, above which a training without weights has few images: more than the 730 of WRN-28-10 on CIFAR-10
# (Zagoruyko & Komodakis 2016), which needs no weights.
MANY_PARAMETERS = 1000


def run_header(job: Job, trainer: pl.Trainer, *, decoder: DecoderChoice, resume: Checkpoint | None) -> dict[str, str]:
    """Return the settings and places of a run by name."""
    dataset, settings = job.data.dataset, job.data.settings
    splits = ", ".join(f"{name} {split.samples:,}" for name, split in dataset.splits.items())
    device = trainer.strategy.root_device
    is_gpu = device.type == "cuda"
    on_cpu = f"CPU, {torch.get_num_threads()} threads{unusable_gpu()}"
    device_name = torch.cuda.get_device_name(device) if is_gpu else on_cpu
    accumulate = f" x {settings.accumulate} accumulated" if settings.accumulate > 1 else ""
    folder = job.run.folder
    size, link, command = describe_size(job.data.training_augment.size), job.tracker.link, job.tracker.command
    share = job.data.core_share(trainer.num_devices)
    return {
        "model": f"{job.settings.network}, {job.num_parameters:,} parameters",
        "data": f"{dataset.name}: {splits}, {len(dataset.classes)} classes, {size} pixels",
        **describe_start(job),
        **describe_evaluation(job),
        "batch": f"{trainer.world_size} x {settings.batch_size}{accumulate} on {device_name}",
        "decoding": f"{decoder}; {share.cores} threads a rank ({share.reason})",
        "precision": f"{trainer.precision}, channels_last",
        "steps": describe_steps(job, trainer),
        **describe_learning_rate(job.module),
        **describe_mixing(job.module.recipe),
        **describe_finetuning(job.module.recipe, num_steps=trainer.max_steps),
        "folder": f"{folder} (continues after step {resume.step})" if resume else str(folder),
        "dashboard": f"{link}{f' ({command})' if command else ''}" if link else "none",
    }


def describe_start(job: Job) -> dict[str, str]:
    """Return a caution for a training that starts with random weights and should not."""
    images, weights = job.data.dataset.splits["train"].samples, job.initial_weights
    if weights.file is not None:
        return {}
    if job.module.recipe.freeze:
        return {"weights": "none: frozen parts keep random values, add weights=FILE"}
    if weights.head == "auto":
        return {"weights": "none: this recipe is for trained ones, add weights=FILE"}
    if job.num_parameters <= MANY_PARAMETERS * images:
        return {}
    advice = "weights=FILE recipe=finetune starts with trained ones, a smaller network has fewer"
    return {"few images": f"{images:,} for {job.num_parameters:,} random parameters: {advice}"}


def describe_evaluation(job: Job) -> dict[str, str]:
    """Return what chooses the best checkpoint and ends the training; a warning where that is the test split."""
    choice, split = job.settings.choice, job.data.evaluation_split
    if split is None:
        return {"evaluation": "none: no split val or test"}
    best, key = "highest" if choice.metric.is_higher_better else "lowest", choice.metric.key
    facts = {"evaluation": f"{evaluation_images(job.data)}; the best checkpoint has the {best} {key}"}
    if split == "test":
        facts["caution"] = (
            "without a split val, the best checkpoint is chosen on the test split, so its score is no honest estimate"
        )
    if choice.patience is not None:
        times = "1 evaluation" if choice.patience == 1 else f"{choice.patience} evaluations in a row"
        enough = f" of more than {choice.min_improvement:g}" if choice.min_improvement else ""
        facts["stop early"] = f"after {times} without an improvement of {key}{enough}"
    return facts


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
        text += "; the learning rate still rises at the last step: shorten the warm-up"
    return text


def describe_learning_rate(module: Classifier) -> dict[str, str]:
    """Return the highest learning rate and how it came about, unless the optimizer chooses it, and a caution."""
    rate = module.recipe.learning_rate(module.images_per_step)
    facts = {} if rate is None else {"rate": f"{rate.value:.4g} ({rate.origin})"}
    if module.recipe.falls_in_vain:
        facts["schedule"] = "the rate falls, and this optimizer is made for a constant one: add schedule=constant"
    return facts


def describe_mixing(recipe: Recipe) -> dict[str, str]:
    """Return how images are mixed, nothing where they are not."""
    return {} if recipe.mix is None else {"mixing": recipe.mix.describe(recipe.epochs)}


def describe_finetuning(recipe: Recipe, *, num_steps: int) -> dict[str, str]:
    """Return which parts train, when and how fast, nothing where all train alike."""
    alone, facts = recipe.count_head_steps(num_steps), list[str]()
    if alone:
        facts.append(f"the head alone in the first {alone:,} steps")
    if recipe.layer_decay is not None:
        facts.append(f"each stage at {recipe.layer_decay:g} of the rate of the next")
    if recipe.freeze:
        facts.append(f"{', '.join(recipe.freeze)} frozen")
    return {"tuning": "; ".join(facts)} if facts else {}


def saving_of(trainer: pl.Trainer) -> SaveCheckpoints:
    """Return the callback that saves checkpoints."""
    return next(one for one in trainer.checkpoint_callbacks if isinstance(one, SaveCheckpoints))


def outcome(job: Job, trainer: pl.Trainer) -> dict[str, object]:
    """Return the result of a finished training: the best checkpoint, its metrics, and why it stopped early, if it did.

    `chosen_by` names the metric that chose the checkpoint; its value and top-1 are those of this checkpoint.
    """
    saving = saving_of(trainer)
    path, key, best = job.run.best_checkpoint, saving.monitor, saving.best
    values: dict[str, float | None] = dict.fromkeys((TOP1.key, top1_of(key).key))
    if best is not None and {*values} != {key}:  # the journal has what the checkpoint has not
        found = job.run.journal.values_at(best.step)
        values = {name: found.get(name) for name in values}
    if key is not None:
        values[key] = None if best is None else best.score
    manifest = job.run.checkpoints.find(trainer.global_step if best is None else best.step)
    checkpoint = {"checkpoint": str(path), "checkpoint_sha256": manifest and manifest.sha256}
    stopped = [one.reason for one in trainer.early_stopping_callbacks if isinstance(one, StopEarly) and one.reason]
    early = {"stopped_early": stopped[0]} if stopped else {}
    skipped = {"skipped_steps": saving.guard.num_skipped} if saving.guard.num_skipped else {}
    return {**values, "chosen_by": key, **checkpoint, **early, **skipped}


def run_result(job: Job, result: Mapping[str, Any]) -> dict[str, str]:
    """Return why it stopped early, the best metric, the checkpoint and the next command, by name."""
    key, tracker = result["chosen_by"], job.tracker
    facts = {"stopped early": result["stopped_early"]} if "stopped_early" in result else {}
    if "skipped_steps" in result:
        facts["skipped"] = f"{result['skipped_steps']:,} steps, whose loss or gradient was not finite"
    if key is not None and result[key] is None:
        facts[f"best {key}"] = "none: no evaluation had a finite value, so the checkpoint is the last one"
    elif key is not None:
        its = top1_of(key).key
        is_known = key != its and result[its] is not None
        top1 = f"; its {its} is {result[its]:.4f}" if is_known else ""
        facts[f"best {key}"] = f"{result[key]:.4f} on {evaluation_images(job.data)}{top1}"
    facts["checkpoint"] = result["checkpoint"]
    if tracker.link and tracker.command:
        facts["dashboard"] = tracker.command
    has_split = job.data.evaluation_split is not None
    return facts | {"next": f"python -m pipeline.{'evaluate' if has_split else 'report'} run={job.run.folder}"}


def evaluation_images(data: ShardData) -> str:
    """Return the number of images that an evaluation counts, and their split."""
    return f"{data.num_evaluation_images:,} images of split {data.evaluation_split}"


def print_missing(missing: str | None, run: Run) -> None:
    """Print the dashboard's gaps, and the file that has every point."""
    if missing is not None:
        text = f"{missing}; {run.journal.path} has every point"
        print_line(main_console(), text)
