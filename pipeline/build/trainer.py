"""From a config to Lightning's Trainer, without the parts that this project does itself."""

import inspect
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from data.loading.datamodule import ShardData
from models.learning.recipe import Recipe
from pipeline.build.objects import build_object
from pipeline.cli.errors import config_keys_in_errors, nearest

# Options of the Trainer that this project sets, and the config key that sets each instead.
RESERVED = {
    "max_epochs": "recipe.epochs",
    "max_steps": "recipe.epochs",
    "accumulate_grad_batches": "recipe.accumulate",
    "gradient_clip_val": "recipe.clip_norm",
    "default_root_dir": "runs",
    "logger": "tracking",
    "callbacks": "callbacks",
}
OWN = ("enable_progress_bar", "enable_model_summary", "num_sanity_val_steps", "use_distributed_sampler")
RESERVED |= dict.fromkeys(OWN, "this project")


def build_trainer(
    config: DictConfig, recipe: Recipe, *, callbacks: Sequence[pl.Callback], plugins: Sequence[object], folder: Path
) -> pl.Trainer:
    """Build Lightning's Trainer; logging, progress, summaries and evaluation sampling are this project's.

    Raises: ValueError for unknown or reserved options, devices that the machine does not have, or a sweep over several
    processes.
    """
    options = config.trainer
    _check_options(options)
    user_plugins = build_object(config, "trainer.plugins", kind=list) if options.get("plugins") else []
    try:
        trainer = build_object(
            config,
            "trainer",
            kind=pl.Trainer,
            precision=choose_precision(options.precision, options.accelerator),
            max_epochs=-1,  # training ends by steps: ending by epochs repeats one after the second resume
            accumulate_grad_batches=recipe.accumulate,
            gradient_clip_val=recipe.clip_norm,
            callbacks=list(callbacks),
            default_root_dir=str(folder),
            plugins=[*user_plugins, *plugins],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
    except MisconfigurationException as error:
        raise ValueError(f"trainer: {error} trainer=auto uses what the machine has") from error
    if trainer.world_size > 1 and trainer.strategy.launcher is not None and {"-m", "--multirun"} & set(sys.argv):
        raise ValueError("each process that Lightning starts would repeat the sweep: use one device, or torchrun")
    return trainer


def build_callbacks(config: DictConfig) -> list[pl.Callback]:
    """Build the callbacks of `config.callbacks`, which run after the project's own. Raises: ValueError."""
    return [build_object(config, f"callbacks.{name}", kind=pl.Callback) for name in config.callbacks]


def choose_precision(precision: str, accelerator: str) -> str:
    """Resolve `auto`: bfloat16 where the device multiplies it faster than float32, else float16 on GPUs or float32."""
    if precision != "auto":
        return precision
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.get_device_capability() >= (8, 0) else "16-mixed"
    capabilities = torch.cpu.get_capabilities()
    return "bf16-mixed" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "32-true"


def limit_epoch(trainer: pl.Trainer, data: ShardData, *, num_epochs: int) -> None:
    """Set the length of the training in optimizer steps, and of an epoch under `+trainer.limit_train_batches`.

    Raises: ValueError when there are fewer images than ranks or than a global batch, or when the limit ends inside an
    optimizer step.
    """
    accumulate, limit = data.settings.accumulate, trainer.limit_train_batches
    with config_keys_in_errors({"batch_size": "data.batch_size", "accumulate": "recipe.accumulate"}):
        available = data.checked_plan(trainer.world_size).num_steps
    batches = min(available, limit if isinstance(limit, int) else int(available * limit))
    if batches == 0 or batches % accumulate:
        raise ValueError(
            f"trainer.limit_train_batches={limit} leaves {batches} of {available} batches an epoch, "
            f"which must be positive and a multiple of recipe.accumulate={accumulate}"
        )
    # The order needs the epoch's length too; Lightning would apply a fraction again to the shortened epoch.
    data.limit_batches = trainer.limit_train_batches = batches
    trainer.fit_loop.epoch_loop.max_steps = num_epochs * (batches // accumulate)


def silence_lightning() -> None:
    """Silence Lightning's advice on what this project decides itself."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")


def _check_options(options: DictConfig) -> None:
    known = inspect.signature(pl.Trainer).parameters
    for name in map(str, options):
        if name == "_target_":
            continue
        if name not in known:
            raise ValueError(f"there is no trainer.{name}{nearest(name, known)}")
        if name in RESERVED:
            raise ValueError(f"trainer.{name} is set by {RESERVED[name]}: leave it out")
