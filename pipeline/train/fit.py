"""What `train` does once everything is built: the trainer, the run with its dashboard, the fit, and how it went."""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import nn

from data.loading.datamodule import ShardData
from data.shards.dataset import Dataset
from models.analysis.trace import RAISED, Untraceable, dtype_of, trace
from models.options import SMALL
from models.weights.load import OURS, load_weights
from pipeline.cli.config import nearest
from pipeline.cli.console import is_main_process, main_console, print_facts
from pipeline.runs.checkpoint import KeepBest, WholeFiles
from pipeline.runs.run import METRICS, Run, fingerprint, saved_step
from pipeline.train.progress import Record, Reporter
from pipeline.train.seeding import SeedEachBatch
from pipeline.train.summary import Job, banner, end, keep_report, places

MakeTrainer = partial[pl.Trainer]  # Lightning's, with what a config says
# What a shell makes of SIGTERM and of Ctrl-C: by the first, schedulers tell a requeue from success.
TERMINATED, INTERRUPTED = 128 + 15, 128 + 2
# What this project decides itself, and where it is told what to decide.
DECIDED = {
    "max_epochs": "recipe.epochs",
    "max_steps": "recipe.epochs",
    "accumulate_grad_batches": "recipe.accumulate",
    "gradient_clip_val": "recipe.clip_norm",
    "default_root_dir": "runs",
    "logger": "tracking",
    "callbacks": "this project",
    "enable_progress_bar": "this project",
    "enable_model_summary": "this project",
    "num_sanity_val_steps": "this project",
    "use_distributed_sampler": "this project",
}


def begin(seed: int) -> None:
    """Silence what Lightning says of things this project decides itself, and seed all that draws at random."""
    quieten_lightning()
    pl.seed_everything(seed, verbose=False)


def num_outputs(dataset: Dataset, model: Mapping[str, Any]) -> int:
    """How many classes the network of this config tells apart: those of the data set, unless it asks for more.

    Raises: ValueError when it asks for fewer, or for images of other than three channels.
    """
    wanted = model.get("num_classes")
    wanted = len(dataset.classes) if wanted is None else wanted
    if not isinstance(wanted, int):
        raise ValueError(f"model.num_classes={wanted} must be a whole number")
    if wanted < len(dataset.classes):
        raise ValueError(
            f"model.num_classes={wanted}, but labels of {dataset.name} go to {len(dataset.classes) - 1}: "
            f"at least {len(dataset.classes)} are needed"
        )
    channels = model.get("in_channels", 3)
    if channels != 3:
        raise ValueError(f"model.in_channels={channels}, but every image is shown with 3 channels, grey ones too")
    return wanted


def digest_of_weights(file: str | None, wanted: str | None) -> str | None:
    """The SHA-256 of a file of weights, which stands for it in a run's name and fingerprint.

    Where it is given whole, a run that goes on with its own weights finds itself without the file.
    Raises: FileNotFoundError; ValueError when another was wanted.
    """
    if file is None:
        return wanted
    path, wanted = Path(str(file)), None if wanted is None else str(wanted).lower()
    if not path.is_file():
        if wanted is not None and len(wanted) == 2 * hashlib.sha256().digest_size:
            return wanted
        raise FileNotFoundError(f"weights={path}: there is no such file")
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if wanted is not None and not digest.startswith(wanted):
        raise ValueError(f"weights={path} has the SHA-256 {digest}, not weights.sha256={wanted}")
    return digest


def take_weights(job: Job, told: Mapping[str, Any]) -> None:
    """Begin with the weights of a file, and say what was taken; a run that goes on has its own.

    Raises: FileNotFoundError, ValueError when the file does not fit the network, or there is none to do it with.
    """
    if told["file"] is None:
        if idle := [name for name, value in told.items() if value not in (None, "keep", [])]:
            raise ValueError(f"weights.{idle[0]}={told[idle[0]]} is for a file: add weights=FILE")
        return
    path = Path(str(told["file"]))
    if job.run.last_checkpoint is not None:
        print_facts(main_console(), {"weights": f"not read from {path}: the run goes on with its own"})
        return
    options = {"head": told["head"], "stem": told["stem"], "skip": list(told["skip"])}
    loaded = load_weights(job.module.net, path, norm_eps=job.values.get("model.norm_eps"), **options)
    facts = {"weights": f"{path}: {loaded}"}
    own = getattr(job.module.net, "image_size", None)
    theirs = loaded.image_size if loaded.names_of == OURS.name else SMALL + 1  # publishers' are for large images
    if own and theirs and (own <= SMALL) != (theirs <= SMALL):
        facts["strides"] = f"those for images of {own} pixels, not those with which {path} was trained"
    print_facts(main_console(), facts)


def check_image_size(job: Job) -> None:
    """Raise ValueError unless the network takes images of the sizes that the data shows.

    Shapes alone tell of nearly every network; of one that looks at numbers, a run of a copy on two empty images.
    """
    net, data = job.module.net, job.data
    for size in sorted({data.training_view.image_size, data.evaluation_view.image_size}):
        try:
            run_once(net, (2, 3, size, size))
        except RAISED as error:
            raise ValueError(
                f"data.image_size={size} is no size for {job.values.get('model.variant', 'this network')}, "
                f"built for {job.values.get('model.image_size', 'others')}: {str(error).partition(chr(10))[0]}"
            ) from error


def run_once(net: nn.Module, shape: tuple[int, int, int, int]) -> None:
    """Run a network in evaluation on a batch of this shape, (N, C, H, W), and leave it as it is.

    Raises: what the network raises, one of RAISED as a rule.
    """
    try:
        trace(net, shape)
    except Untraceable:
        with torch.no_grad():
            copy.deepcopy(net).eval()(torch.zeros(shape, dtype=dtype_of(net)))


def train(job: Job, make_trainer: MakeTrainer, *, config: str) -> None:
    """Fit, and keep and show what comes of it; `config` is the YAML that the run keeps.

    Raises: ValueError, OSError for what a user can cause; SystemExit(143) after a SIGTERM, 130 after Ctrl-C.
    """
    run, module, data = job.run, job.module, job.data
    checkpoint = KeepBest(run.checkpoints, monitor="val/top1" if data.num_evaluation_images else None)
    num_epochs = module.recipe.epochs
    reporter = Reporter(main_console(), recorder(job), log_every=job.values["log_every"], num_epochs=num_epochs)
    chance = SeedEachBatch(job.values["seed"])
    trainer = build_trainer(make_trainer, job, callbacks=[chance, reporter, checkpoint])
    num_steps = steps_per_epoch(trainer, data)
    # So that the order, too, knows where an epoch ends; Lightning would take a fraction of the shortened epoch again.
    data.limit_batches = trainer.limit_train_batches = num_steps * data.feeding.accumulate
    trainer.fit_loop.epoch_loop.max_steps = num_epochs * num_steps
    with followed(job, trainer, config=config):
        print_facts(main_console(), {**banner(job, trainer), **places(job)})
        fit(trainer, job)
        result = {"val/top1": as_number(checkpoint.best_model_score), "checkpoint": best_of(checkpoint, run)}
        if trainer.is_global_zero:
            run.finish(result)
    print_facts(main_console(), end(job, result))


def build_trainer(make: MakeTrainer, job: Job, *, callbacks: list[pl.Callback]) -> pl.Trainer:
    """Lightning's Trainer without what this project does itself: logging, bars, summaries, padding of evaluations.

    Raises: ValueError when the config sets what is decided here.
    """
    check_options(make.keywords)
    recipe, wanted = job.module.recipe, make.keywords
    try:
        trainer = make(
            precision=choose_precision(wanted["precision"], wanted["accelerator"]),
            max_epochs=-1,  # training ends by steps: ending by epochs replays one after the second resume
            accumulate_grad_batches=recipe.accumulate,
            gradient_clip_val=recipe.clip_norm,
            callbacks=callbacks,
            default_root_dir=str(job.run.folder),
            plugins=plugins(make.keywords.get("plugins")),
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
    except MisconfigurationException as error:  # no such device, or fewer of them
        raise ValueError(f"trainer: {error} trainer=auto takes what the machine has") from error
    if trainer.world_size > 1 and trainer.strategy.launcher is not None and {"-m", "--multirun"} & set(sys.argv):
        raise ValueError("each process that Lightning starts would repeat the sweep: take one device, or torchrun")
    return trainer


def check_options(options: Mapping[str, object]) -> None:
    """Raise ValueError for an option that Lightning's Trainer does not have, or that is decided here."""
    known = inspect.signature(pl.Trainer).parameters
    for name in options:
        if name not in known:
            raise ValueError(f"there is no trainer.{name}{nearest(name, known)}")
        if name in DECIDED:
            raise ValueError(f"trainer.{name} is decided by {DECIDED[name]}: leave it out")


def choose_precision(wanted: str, accelerator: str) -> str:
    """bfloat16 where the device multiplies it faster than float32, for `auto`; else what is wanted."""
    if wanted != "auto":
        return wanted
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.get_device_capability() >= (8, 0) else "16-mixed"
    capabilities = torch.cpu.get_capabilities()
    return "bf16-mixed" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "32-true"


def steps_per_epoch(trainer: pl.Trainer, data: ShardData) -> int:
    """Optimizer steps of an epoch, fewer under `+trainer.limit_train_batches`.

    Raises: ValueError when there are too few images for so many ranks.
    """
    batches = data.checked_plan(trainer.world_size).num_steps
    limit = trainer.limit_train_batches
    wanted = min(batches, limit if isinstance(limit, int) else int(batches * limit))
    if wanted == 0 or wanted % data.feeding.accumulate:
        raise ValueError(
            f"trainer.limit_train_batches={limit} leaves {wanted} of {batches} batches an epoch, "
            f"which must be some, and a multiple of recipe.accumulate={data.feeding.accumulate}"
        )
    return wanted // data.feeding.accumulate


def recorder(job: Job) -> Record:
    """Writes a point of each curve to the journal, then to the dashboard."""

    def record(values: Mapping[str, float], step: int) -> None:
        job.run.record(values, step)
        job.tracker.log(values, step)

    return record


@contextmanager
def followed(job: Job, trainer: pl.Trainer, *, config: str) -> Iterator[None]:
    """Begin the run's folder and its page on the dashboard, or go on with both; end the page however the block ends."""
    run, tracker = job.run, job.tracker
    global_batch_size = job.data.training_plan(0, trainer.world_size).global_batch_size
    computes = fingerprint(
        job.values, job.data.dataset, global_batch_size=global_batch_size, precision=str(trainer.precision)
    )
    run.check(computes)
    if not is_main_process():
        yield
        return
    with run.held():
        run.begin(computes, config)
        reached = run.cut_back()
        say_missing(tracker.start(run, job.values, reached=reached), run)
        tracker.keep(run.folder / "config.yaml", "config")
        if not reached:
            keep_report(job, trainer)
        succeeded = False
        try:
            yield
            succeeded = True
        finally:
            say_missing(tracker.finish(succeeded=succeeded), run)


def say_missing(missing: str | None, run: Run) -> None:
    """Say what the dashboard does not have, and where it is."""
    if missing is not None:
        text = f"{missing}; {run.folder / METRICS} has every point"
        main_console().print(text, highlight=False, soft_wrap=True)


def fit(trainer: pl.Trainer, job: Job) -> None:
    """Lightning's fit from the run's last checkpoint on, with its ends told apart."""
    try:
        trainer.fit(job.module, datamodule=job.data, ckpt_path=job.run.last_checkpoint, weights_only=True)
    except SystemExit as error:  # Lightning's, after a signal
        last = job.run.last_checkpoint
        where = f"after step {saved_step(last)}" if last is not None else "at its beginning"
        main_console().print(f"stopped: the same command goes on {where}", highlight=False)
        raise SystemExit(TERMINATED if isinstance(error, SIGTERMException) else INTERRUPTED) from error
    except torch.OutOfMemoryError as error:
        size = job.data.feeding.batch_size
        raise ValueError(
            f"a batch of {size} images does not fit into the GPU's memory: lower data.batch_size, "
            "and raise recipe.accumulate by as much to keep the global batch"
        ) from error


def best_of(checkpoint: KeepBest, run: Run) -> str:
    """The best checkpoint, or the last where none was measured, by its path from here."""
    measured = checkpoint.best_model_score is not None
    return str(run.checkpoints / Path(checkpoint.best_model_path if measured else checkpoint.last_model_path).name)


def as_number(score: torch.Tensor | None) -> float | None:
    """A score as JSON has it."""
    return None if score is None else float(score)


def plugins(wanted: list[object] | None) -> list[Any]:
    """The config's plugins and ours: whole checkpoints, and on Slurm none that Lightning would write and requeue."""
    own: list[object] = [WholeFiles()]
    if SLURMEnvironment.detect():
        own.append(SLURMEnvironment(auto_requeue=False))
    return [*(wanted or []), *own]


def quieten_lightning() -> None:
    """Silence what Lightning says of things this project decides itself."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
