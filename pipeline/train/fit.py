"""A training from a built job to a finished run: callbacks, dashboard, Lightning's fit, and how it ended."""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from pytorch_lightning.utilities.exceptions import SIGTERMException

from data.children import end_with_me
from data.loading.datamodule import ShardData
from models.arguments import require
from models.learning.evaluation import TOP5
from pipeline.build.choice import Choice
from pipeline.build.memory import GPU_MEMORY, exhausted_memory
from pipeline.cli.console import is_main_process, main_console, print_facts
from pipeline.cli.errors import INTERRUPTED, config_keys_in_errors
from pipeline.runs.checkpoint import AtomicCheckpointIO, BestCheckpoint, saved_step
from pipeline.runs.fingerprint import fingerprint
from pipeline.tracking.tracker import State
from pipeline.train.compiling import CompileNetwork
from pipeline.train.early_stopping import StopEarly
from pipeline.train.job import Job
from pipeline.train.progress import ProgressCallback
from pipeline.train.seeding import SeedEachBatch
from pipeline.train.stopping import StopTogether
from pipeline.train.summary import outcome, print_missing, run_header, run_result

# The shell's exit code for SIGTERM, by which schedulers tell a preempted job from a finished one.
TERMINATED = 128 + 15


def prepare_process(seed: int) -> None:
    """Seed every generator, and silence Lightning's advice on what this project decides itself. Raises: ValueError."""
    require(0 <= seed < 2**32, "must be at least 0 and less than 2^32", seed=seed)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    pl.seed_everything(seed, verbose=False)


def own_callbacks(job: Job) -> list[pl.Callback]:
    """Build the callbacks of every training: seeding, progress, checkpoints, ends before the last epoch."""

    def record(values: Mapping[str, float], step: int) -> None:
        job.run.journal.record(values, step)
        job.tracker.update()

    log_every, num_epochs = job.settings.log_every, job.module.recipe.epochs
    progress = ProgressCallback(main_console(), record, data=job.data, log_every=log_every, num_epochs=num_epochs)
    choice = job.settings.choice
    monitor = choice.metric.key if job.data.num_evaluation_images else None
    checkpoint = BestCheckpoint(job.run.checkpoints, monitor=monitor, mode=choice.metric.mode)
    stopping = [] if choice.patience is None else [StopEarly(choice, num_epochs=num_epochs)]
    with config_keys_in_errors({"compile": "trainer.compile"}):
        compiling = [CompileNetwork(job.settings.compile, main_console())] if job.settings.compile else []
    return [SeedEachBatch(job.settings.seed), progress, checkpoint, *stopping, StopTogether(), *compiling]


def own_plugins() -> list[object]:
    """Build the plugins of every training: atomic checkpoints, and no checkpoint or requeue by Lightning on Slurm."""
    slurm = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
    return [AtomicCheckpointIO(), *slurm]


def train(job: Job, trainer: pl.Trainer) -> None:
    """Fit the job's module, keep its results in the run's folder and print them.

    Raises: ValueError, OSError for user errors; SystemExit(143) after SIGTERM, SystemExit(130) after Ctrl-C.
    """
    limit_epoch(trainer, job.data, num_epochs=job.module.recipe.epochs)
    check_choice(job, trainer)
    with config_keys_in_errors({"decoder": "data.decoder"}):
        device, probes = trainer.strategy.root_device, is_main_process()
        decoder = job.data.choose_decoder(device, before=job.run.decoder, probes=probes)
    with tracked(job, trainer):
        print_facts(main_console(), run_header(job, trainer, decoder=decoder))
        fit(job, trainer)
        result = outcome(job, trainer)
        if trainer.is_global_zero:
            job.run.finish(result)
    print_facts(main_console(), run_result(job, result))


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
        rule = f"which must be positive and a multiple of recipe.accumulate={accumulate}"
        raise ValueError(
            f"trainer.limit_train_batches={limit} leaves {batches} of {available} batches an epoch, {rule}"
        )
    # The order needs the epoch's length too; Lightning would apply a fraction again to the shortened epoch.
    data.limit_batches = trainer.limit_train_batches = batches
    trainer.fit_loop.epoch_loop.max_steps = num_epochs * (batches // accumulate)


def check_choice(job: Job, trainer: pl.Trainer) -> None:
    """Raise ValueError when early stopping, or a configured metric, has no evaluation to depend on."""
    choice, dataset = job.settings.choice, job.data.dataset
    if choice == Choice():
        return
    key, value = ("choose_by", choice.metric.key) if choice.patience is None else ("stop_early", choice.patience)
    no_split = f"needs an evaluation, and {dataset.name} has no split val or test: leave {key} out, or add a split"
    require(job.data.num_evaluation_images > 0, no_split, **{key: value})
    no_batch = f"needs an evaluation: leave {key} or trainer.limit_val_batches=0 out"
    require(trainer.limit_val_batches != 0, no_batch, **{key: value})
    few = f"needs more than five classes, and {dataset.name} has {len(dataset.classes)}: choose_by=top1 goes with any"
    require(choice.metric != TOP5 or job.module.top_k == 5, few, choose_by=choice.metric.key)


@contextmanager
def tracked(job: Job, trainer: pl.Trainer) -> Iterator[None]:
    """Create or continue the run's folder and its page on the dashboard; close the page however the block ends.

    Raises: ValueError when the folder is locked or was started with other settings.
    """
    run, tracker = job.run, job.tracker
    current = fingerprint(
        job.settings.in_fingerprint,
        job.data.dataset,
        global_batch_size=job.data.training_plan(0, trainer.world_size).global_batch_size,
        precision=str(trainer.precision),
        decoder=job.data.gpu_decoder,
    )
    run.check(current)
    if not is_main_process():
        yield
        return
    with run.locked():
        run.begin(current, job.settings.record)
        last = run.last_checkpoint
        run.journal.truncate_after(-1 if last is None else saved_step(last))
        state: State = "failed"
        try:
            print_missing(tracker.start(run, job.settings.parameters), run)
            if last is None and tracker.shows_reports:
                from pipeline.train.network_report import record_network_report  # half a second, for dashboards only

                record_network_report(job, precision=str(trainer.precision))
                tracker.update()
            yield
            state = "finished"
        except (SystemExit, KeyboardInterrupt):
            state = "stopped"
            raise
        finally:
            print_missing(tracker.finish(state), run)


def fit(job: Job, trainer: pl.Trainer) -> None:
    """Run Lightning's fit from the run's last checkpoint, and turn its ends into exit codes and user errors."""
    os.environ |= end_with_me()  # for the ranks that Lightning starts
    try:
        with config_keys_in_errors({"clip_norm": "recipe.clip_norm"}):
            trainer.fit(job.module, datamodule=job.data, ckpt_path=job.run.last_checkpoint, weights_only=True)
    except SystemExit as error:  # raised by Lightning after a signal
        last = job.run.last_checkpoint
        resume = f"continues after step {saved_step(last)}" if last is not None else "restarts from step 0"
        main_console().print(f"stopped: the same command {resume}", highlight=False)
        raise SystemExit(TERMINATED if isinstance(error, SIGTERMException) else INTERRUPTED) from error
    except (RuntimeError, MemoryError) as error:
        memory = exhausted_memory(error)
        if memory is None:
            raise
        pools = ", with DALI's pools" if memory == GPU_MEMORY else ""
        raise ValueError(
            f"a batch of {job.data.settings.batch_size} images does not fit into {memory}{pools}: "
            "lower data.batch_size, and raise recipe.accumulate by the same factor to keep the global batch"
        ) from error
