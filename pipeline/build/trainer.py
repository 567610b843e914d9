"""From a config to Lightning's Trainer, without the parts that this project does itself."""

import inspect
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.strategies import DDPStrategy

from data.shards.parallel import share_of_cores
from models.arguments import require
from models.learning.classifier import Classifier
from pipeline.build.objects import build_object
from pipeline.cli.errors import nearest

# Options of the Trainer that this project fixes.
FIXED = {
    "max_epochs": -1,  # training ends by steps: ending by epochs repeats one after the second resume
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
}
# Options that other config keys set.
SET_BY = {
    "max_epochs": "recipe.epochs",
    "max_steps": "recipe.epochs",
    "accumulate_grad_batches": "recipe.accumulate",
    "gradient_clip_val": "recipe.clip_norm",
    "default_root_dir": "runs",
    "logger": "tracking",
    "callbacks": "callbacks",
}


def build_trainer(
    config: DictConfig, module: Classifier, *, callbacks: Sequence[pl.Callback], plugins: Sequence[object], folder: Path
) -> pl.Trainer:
    """Build Lightning's Trainer; logging, progress, summaries and evaluation sampling are this project's.

    Raises: ValueError for unknown or reserved options, devices that the machine does not have, or a sweep over several
    processes.
    """
    check_options(config.trainer)
    # `compile` is ours: Lightning's Trainer has no such option.
    plain = OmegaConf.to_container(config.trainer, resolve=True)
    assert isinstance(plain, dict)
    options = OmegaConf.create({name: value for name, value in plain.items() if name != "compile"})
    launched = launched_ranks(os.environ)
    if launched is not None and options.devices == "auto":
        options.devices, options.num_nodes = launched.per_node, options.get("num_nodes", launched.nodes)
    # Batches have one shape in a training and at most two in an evaluation: cuDNN may choose its fastest algorithms.
    benchmark = options.get("benchmark", not options.get("deterministic"))
    user_plugins = build_object(config, "trainer.plugins", kind=list) if options.get("plugins") else []
    try:
        trainer = build_object(
            OmegaConf.create({"trainer": options, "trust": config.get("trust")}),
            "trainer",
            kind=pl.Trainer,
            precision=choose_precision(options.precision, options.accelerator, is_depthwise=module.is_depthwise),
            accumulate_grad_batches=module.recipe.accumulate,
            gradient_clip_val=module.recipe.clip_norm,
            callbacks=list(callbacks),
            default_root_dir=str(folder),
            plugins=[*user_plugins, *plugins],
            benchmark=benchmark,
            **FIXED,
        )
    except MisconfigurationException as error:
        problem, reason = f"trainer: {error}", no_gpu_reason()
        if reason and options.accelerator in ("gpu", "cuda"):
            problem = f"trainer.accelerator={options.accelerator}: there is no GPU{reason}"
        raise ValueError(f"{problem.rstrip('.')}: trainer=auto uses what the machine has") from error
    _check_trainer(trainer, launched, options=options)
    if isinstance(trainer.strategy, DDPStrategy):
        # Gradients live in the buffers that are reduced. Ranks need no common batch-norm statistics before an
        # evaluation, for which the Classifier broadcasts them.
        for name, value in (("gradient_as_bucket_view", True), ("broadcast_buffers", False)):
            trainer.strategy._ddp_kwargs.setdefault(name, value)
    if trainer.world_size > 1 and trainer.strategy.launcher is not None and {"-m", "--multirun"} & set(sys.argv):
        raise ValueError("each process that Lightning starts would repeat the sweep: use one device, or torchrun")
    return trainer


def limit_threads(local_ranks: int) -> None:
    """Let torch compute on this rank's share of the cores, unless OMP_NUM_THREADS says how many threads.

    torch takes one thread a core of the machine, also where a container, Slurm or other ranks leave this one fewer.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), share_of_cores(local_ranks).cores))


class LaunchedRanks(NamedTuple):
    """The processes that torchrun or srun has started for one training."""

    nodes: int
    per_node: int


def launched_ranks(environment: Mapping[str, str]) -> LaunchedRanks | None:
    """Return the ranks of a launcher, None without one. Raises: ValueError for other numbers of ranks on some nodes."""
    names = {
        "torchrun": ("WORLD_SIZE", "LOCAL_WORLD_SIZE"),
        "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"),
    }
    for launcher, (total, per_node) in names.items():
        if total not in environment or per_node not in environment:
            continue  # Lightning sets one of them for the ranks that it starts
        if not re.fullmatch(r"\d+(\(x\d+\))?", environment[per_node]):
            advice = "the same number on every node is needed: srun --ntasks-per-node=N"
            raise ValueError(f"{launcher} has started {environment[per_node]} ranks on its nodes: {advice}")
        ranks, on_each = int(environment[total]), int(environment[per_node].partition("(")[0])
        if ranks > 1:
            return LaunchedRanks(ranks // on_each, on_each)
    return None


def accept_ntasks(launched: LaunchedRanks) -> None:
    """Let Lightning's SLURMEnvironment accept `srun --ntasks` without `--ntasks-per-node`."""
    os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(launched.per_node))


def _check_trainer(trainer: pl.Trainer, launched: LaunchedRanks | None, *, options: DictConfig) -> None:
    """Raise ValueError for float16 on a CPU, where Lightning takes bfloat16, and where some ranks would be left out.

    Each of these would train separately, in the same folder.
    """
    if str(options.precision).startswith("16") and str(trainer.precision).startswith("bf16"):
        raise ValueError(f"trainer.precision={options.precision} needs a GPU: use auto, bf16-mixed or 32-true")
    started = launched.nodes * launched.per_node if launched is not None else trainer.world_size
    if started != trainer.world_size:
        used = f"trainer.devices={options.devices} on {trainer.num_nodes} of the nodes trains with {trainer.world_size}"
        raise ValueError(f"{started} ranks were started, but {used}: trainer.devices=auto takes them all")


def build_callbacks(config: DictConfig) -> list[pl.Callback]:
    """Build the callbacks of `config.callbacks`, which run after the project's own. Raises: ValueError."""
    found = {name: build_object(config, f"callbacks.{name}", kind=pl.Callback) for name in config.callbacks}
    for name, callback in found.items():
        own = "saves checkpoints, which a training does itself: see checkpoint.every_minutes and checkpoint.every_steps"
        require(not isinstance(callback, Checkpoint), own, **{f"callbacks.{name}": type(callback).__name__})
    return list(found.values())


def choose_precision(precision: str, accelerator: str, *, is_depthwise: bool = False) -> str:
    """Resolve `auto`: bfloat16 where the device multiplies it faster than float32, else float16 on GPUs or float32.

    Depthwise convolutions multiply no matrices, so CPUs compute networks of them faster in float32.
    """
    if precision != "auto":
        return precision
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.get_device_capability() >= (8, 0) else "16-mixed"
    capabilities = torch.cpu.get_capabilities()
    is_fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bf16-mixed" if is_fast and not is_depthwise else "32-true"


def no_gpu_reason() -> str:
    """Return why torch has no GPU, such as a driver that is too old for its CUDA; nothing where it has one."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    except (RuntimeError, AssertionError) as error:
        return f" ({str(error).partition('. ')[0]})"
    return ""


def check_options(options: DictConfig) -> None:
    """Raise ValueError for an option that Lightning's Trainer does not have, or that another key sets."""
    known = inspect.signature(pl.Trainer).parameters
    for name in map(str, options):
        if name in ("_target_", "compile"):
            continue
        if name not in known:
            raise ValueError(f"there is no trainer.{name}{nearest(name, known)}")
        if name in FIXED or name in SET_BY:
            raise ValueError(f"trainer.{name} is set by {SET_BY.get(name, 'this project')}: leave it out")
