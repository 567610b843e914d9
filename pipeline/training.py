"""What `train` does once its config is right: data set, network, Lightning, run and tracking put together."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl
import torch
from filelock import FileLock
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning.callbacks import ModelCheckpoint
from rich.console import Console

from data.datamodule import Feeding, ShardData
from data.dataset import Dataset
from data.indexing import open_dataset
from models.classifier import Classifier, Recipe
from pipeline.config import flatten
from pipeline.console import print_facts, report_left_out
from pipeline.journal import Run, open_run, start_run
from pipeline.progress import Record, Reporter
from pipeline.tracking import NoTracker, Tracker

DIGITS = Path("datasets/digits")  # where conf/data/digits.yaml looks for what comes with scikit-learn


def train(config: DictConfig) -> None:
    """Train what the config names; an unfinished run of the same name goes on where it stopped.

    Raises: ValueError, OSError for what a user can cause.
    """
    console = Console(quiet=launched_rank() != 0)
    quieten_lightning()
    pl.seed_everything(config.seed, verbose=False)
    dataset = open_or_pack(config.data, console)
    recipe: Recipe = instantiate(config.recipe)
    data = shard_data(config, dataset, recipe)
    module = build_module(config, dataset, recipe)
    run = open_run(config, dataset)
    tracker: Tracker = instantiate(config.tracking) if launched_rank() == 0 else NoTracker()
    reporter = Reporter(console, recorder(run, tracker), log_every=config.log_every, num_epochs=recipe.epochs)
    checkpoint = keep_best(run, data)
    trainer = build_trainer(config.trainer, recipe, [reporter, checkpoint], run)
    trainer.fit_loop.epoch_loop.max_steps = recipe.epochs * steps_per_epoch(trainer, data)
    with tracked(tracker, run, config, module):
        print_facts(console, {**banner(config, trainer, module, data), **places(run, tracker)})
        trainer.fit(module, datamodule=data, ckpt_path=run.last_checkpoint, weights_only=True)
    if trainer.is_global_zero:
        say_end(console, run, checkpoint, data)


def steps_per_epoch(trainer: pl.Trainer, data: ShardData) -> int:
    """Optimizer steps of an epoch, fewer under `+trainer.limit_train_batches`.

    Raises: ValueError when there are too few images for so many ranks.
    """
    batches = data.check(trainer.world_size).num_steps
    limit = trainer.limit_train_batches
    batches = min(batches, limit if isinstance(limit, int) else int(batches * limit))
    return batches // data.feeding.accumulate


def recorder(run: Run, tracker: Tracker) -> Record:
    """Writes a point of each curve to the journal, then to the dashboard."""

    def record(values: Mapping[str, float], step: int) -> None:
        run.record(values, step)
        tracker.log(values, step)

    return record


def keep_best(run: Run, data: ShardData) -> ModelCheckpoint:
    """The checkpoints after each epoch: the last, and the one with the best top-1 where there is an evaluation."""
    return ModelCheckpoint(
        run.checkpoints,
        filename="best",
        monitor="val/top1" if data.num_evaluation_images else None,
        mode="max",
        save_last=True,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


def open_or_pack(data: DictConfig, console: Console) -> Dataset:
    """Open `data.root`; the digits are packed on first use. One process of many does the work.

    Raises: FileNotFoundError, ValueError when the root is no data set.
    """
    root = Path(data.root)
    folder = root if data.index is None else Path(data.index)
    if root == DIGITS:
        pack_digits(console)
    if not root.is_dir():
        raise FileNotFoundError(f"data.root={root} is no folder: pack one with `python -m pipeline.pack`")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        dataset, left_out = open_dataset(root, folder, label_field=data.label_field)
    report_left_out(console, left_out)
    return dataset


def pack_digits(console: Console) -> None:
    """Pack the data set that comes with scikit-learn, unless another process has."""
    DIGITS.parent.mkdir(exist_ok=True)
    with FileLock(DIGITS.with_name(f".{DIGITS.name}.lock")):
        if not DIGITS.exists():
            from data import sources
            from data.pack import pack

            console.print(f"packing scikit-learn's digits into {DIGITS}")
            pack(sources.digits(val_fraction=0.2, seed=0), DIGITS)


def shard_data(config: DictConfig, dataset: Dataset, recipe: Recipe) -> ShardData:
    """The data module that the config describes."""
    feeding = Feeding(
        config.data.batch_size,
        accumulate=recipe.accumulate,
        seed=config.seed,
        window=config.data.window,
        readahead=config.data.readahead,
        threads=config.data.threads,
    )
    views = instantiate(config.augment, _convert_="all")
    return ShardData(dataset, training_view=views["training"], evaluation_view=views["evaluation"], feeding=feeding)


def build_module(config: DictConfig, dataset: Dataset, recipe: Recipe) -> Classifier:
    """The network with as many outputs as the data set has classes, in its family's Lightning module."""
    num_classes = config.model.get("num_classes") or len(dataset.classes)
    if num_classes < len(dataset.classes):
        raise ValueError(
            f"model.num_classes={num_classes}, but labels of {dataset.name} go to {len(dataset.classes) - 1}: "
            f"at least {len(dataset.classes)} are needed"
        )
    net = instantiate(config.model, num_classes=num_classes)
    module = instantiate(config.classifier, net=net, num_classes=num_classes, recipe=recipe)
    assert isinstance(module, Classifier)
    return module


def build_trainer(config: DictConfig, recipe: Recipe, callbacks: list[pl.Callback], run: Run) -> pl.Trainer:
    """Lightning's Trainer without what this project does itself: logging, bars, summaries, padding of evaluations."""
    trainer: pl.Trainer = instantiate(
        config,
        precision=choose_precision(config.precision, config.accelerator),
        max_epochs=-1,  # training ends by steps: ending by epochs replays one after the second resume
        accumulate_grad_batches=recipe.accumulate,
        gradient_clip_val=recipe.clip_norm,
        callbacks=callbacks,
        default_root_dir=str(run.folder),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    return trainer


def choose_precision(wanted: str, accelerator: str) -> str:
    """bfloat16 where the device multiplies it faster than float32, for `auto`; else what is wanted."""
    if wanted != "auto":
        return wanted
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.get_device_capability() >= (8, 0) else "16-mixed"
    capabilities = torch.cpu.get_capabilities()
    return "bf16-mixed" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "32-true"


@contextmanager
def tracked(tracker: Tracker, run: Run, config: DictConfig, module: Classifier) -> Iterator[None]:
    """Begin the run's folder and its page on the dashboard; end the page however the block ends."""
    if launched_rank() != 0:
        yield
        return
    start_run(run, config)
    checkpoint = run.last_checkpoint
    run.cut_back(torch.load(checkpoint, mmap=True, weights_only=True)["global_step"] if checkpoint is not None else -1)
    tracker.start(run, dict(flatten(config)))
    tracker.keep(run.folder / "config.yaml", "config")
    tracker.log({"params_millions": num_parameters(module) / 1e6}, 0)
    succeeded = False
    try:
        yield
        succeeded = True
    finally:
        tracker.finish(succeeded=succeeded)


def banner(config: DictConfig, trainer: pl.Trainer, module: Classifier, data: ShardData) -> dict[str, str]:
    """What is about to run, by name."""
    dataset, feeding = data.dataset, data.feeding
    splits = ", ".join(f"{name} {split.samples:,}" for name, split in dataset.splits.items())
    device = trainer.strategy.root_device
    device_name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    accumulate = f" x {feeding.accumulate} accumulated" if feeding.accumulate > 1 else ""
    return {
        "model": f"{config.model.get('variant', config.model._target_)}, {num_parameters(module):,} parameters",
        "data": f"{dataset.name}: {splits}, {len(dataset.classes)} classes, {data.training_view.image_size} pixels",
        "batch": f"{trainer.world_size} x {feeding.batch_size}{accumulate} on {device_name}",
        "precision": f"{trainer.precision}, channels_last",
        "steps": f"{trainer.max_steps:,} in {module.recipe.epochs} epochs",
    }


def places(run: Run, tracker: Tracker) -> dict[str, str]:
    """Where the run is kept and shown."""
    resumed = f" (goes on from {run.last_checkpoint.name})" if run.last_checkpoint is not None else ""
    return {"folder": f"{run.folder}{resumed}", "dashboard": f"{tracker.link} (make ui)" if tracker.link else "none"}


def say_end(console: Console, run: Run, checkpoint: ModelCheckpoint, data: ShardData) -> None:
    """Write the run's final file; print the best metric, the checkpoint, and what to type next."""
    score = checkpoint.best_model_score
    best = checkpoint.best_model_path or checkpoint.last_model_path
    run.finish({"val/top1": None if score is None else float(score), "checkpoint": best})
    facts = {"checkpoint": best, "next": "make ui"}
    if score is not None:
        facts = {"best val/top1": f"{float(score):.4f} of {data.num_evaluation_images:,} images", **facts}
    print_facts(console, facts)


def num_parameters(module: Classifier) -> int:
    """Parameters of the network."""
    return sum(parameter.numel() for parameter in module.net.parameters())


def launched_rank() -> int:
    """This process among all that torchrun, srun or Lightning have started; 0 when a user started it."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # Lightning's children inside srun have both of the last two
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def quieten_lightning() -> None:
    """Silence what Lightning says of things this project decides itself."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
