"""A training from a built job to a finished run: callbacks, dashboard, Lightning's fit, and how it ended."""

import json
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from pytorch_lightning.strategies.launchers import subprocess_script

from data.children import PARENT, end_with_me
from data.loading.datamodule import ShardData
from data.memory import GPU_MEMORY, exhausted_memory
from data.shards.dataset import write_atomically
from models.arguments import require
from models.learning.evaluation import TOP1, TOP5
from models.norms import fit_momentum
from pipeline.build.settings import Again
from pipeline.build.trainer import accept_ntasks, launched_ranks, limit_threads
from pipeline.cli.console import is_main_process, main_console, print_facts, print_line
from pipeline.cli.errors import FailureError, config_keys_in_errors, exit_code
from pipeline.cli.signals import EXIT_CODES, stop_signals
from pipeline.runs.checkpoint_writer import CheckpointWriter
from pipeline.runs.checkpoints import Checkpoint
from pipeline.runs.fingerprint import Fingerprint, fingerprint
from pipeline.runs.run import NONFINITE
from pipeline.runs.status import State, write_status
from pipeline.train.averaging import prepare_averaging
from pipeline.train.callbacks.compiling import CompileNetwork
from pipeline.train.callbacks.divergence import GuardFinite
from pipeline.train.callbacks.early_stopping import StopEarly
from pipeline.train.callbacks.progress import ProgressCallback
from pipeline.train.callbacks.ranks import RankWatch
from pipeline.train.callbacks.saving import SaveCheckpoints
from pipeline.train.callbacks.seeding import SeedEachBatch
from pipeline.train.callbacks.stopping import StopTogether
from pipeline.train.ends import DivergedError, Ending, RanksDifferError, Stopped, ending_of
from pipeline.train.job import Job
from pipeline.train.summary import outcome, print_missing, run_header, run_result, saving_of
from pipeline.train.weights import load_initial_weights

MOVE_SECONDS, POLL_SECONDS = 120.0, 0.1  # until other hosts see that rank 0 has moved a run aside


def prepare_process(seed: int) -> None:
    """Seed every generator, and silence Lightning's advice on what this project decides itself. Raises: ValueError."""
    require(0 <= seed < 2**32, "must be at least 0 and less than 2^32", seed=seed)
    for library in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(library).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=library)
    pl.seed_everything(seed, verbose=False)


def own_callbacks(job: Job) -> list[pl.Callback]:
    """Build the callbacks of every training; those that save and stop come after all that they depend on."""

    def record(values: Mapping[str, float], step: int) -> None:
        job.run.journal.record(values, step)
        job.tracker.update()

    settings, num_epochs, console = job.settings, job.module.recipe.epochs, main_console()
    progress = ProgressCallback(console, record, data=job.data, log_every=settings.log_every, num_epochs=num_epochs)
    choice = settings.choice
    require(settings.hang_seconds > 0, "must be a number above 0", hang_seconds=settings.hang_seconds)
    guard = GuardFinite(settings.on_nonfinite, data=job.data, report=progress.print)
    # Such an optimizer has moved the weights before it knows the gradients.
    rule = "does not go with an optimizer that computes gradients inside its step: use stop"
    require(not guard.skips or not job.module.recipe.computes_gradients, rule, on_nonfinite=settings.on_nonfinite)
    monitor = choice.metric.key if job.data.num_evaluation_images else None
    with config_keys_in_errors({name: f"checkpoint.{name}" for name in ("every_steps", "every_minutes")}):
        saving = SaveCheckpoints(
            job.run.checkpoints, job.run.journal, guard=guard, monitor=monitor, mode=choice.metric.mode,
            every_steps=settings.every_steps,
        )  # fmt: skip
        stopping = StopTogether(saving, guard, signals=stop_signals, every_minutes=settings.every_minutes)
    early = [] if choice.patience is None else [StopEarly(choice, num_epochs=num_epochs)]
    with config_keys_in_errors({"compile": "trainer.compile"}):
        compiling = [CompileNetwork(settings.compile, console)] if settings.compile else []
    return [SeedEachBatch(settings.seed), guard, *compiling, progress, *early, stopping, saving]


def own_plugins(job: Job) -> list[object]:
    """Build the plugins of every training: its checkpoints, and no checkpoint or requeue by Lightning on Slurm."""
    launched = launched_ranks(os.environ)
    if launched is not None:
        accept_ntasks(launched)
    slurm = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
    return [CheckpointWriter(job.run.checkpoints), *slurm]


def train(job: Job, trainer: pl.Trainer, *, norm_eps: float | None) -> None:
    """Fit the job's module, keep its results in the run's folder and print them.

    `norm_eps` is the config's constant of batch norms, which the weights of others must fit.

    Raises: ValueError, OSError for user errors; FailureError for failures; SystemExit(143) after SIGTERM or SIGUSR1,
    SystemExit(130) after Ctrl-C, whose state is saved if it has trained.
    """
    limit_threads(int(os.environ.get("LOCAL_WORLD_SIZE", trainer.num_devices)))
    limit_epoch(trainer, job.data, num_epochs=job.module.recipe.epochs)
    job.module.images_per_step = job.data.images_per_step(trainer.world_size)
    check_choice(job, trainer)
    check_mixing(job)
    is_replaced = job.settings.again == Again.REPLACE and not job.run.is_of(fingerprint_of(job, trainer))
    is_resumed = job.run.last_checkpoint is not None and not is_replaced
    load_initial_weights(job, norm_eps=norm_eps, is_resumed=is_resumed)  # which may fail: then nothing is moved aside
    if not settle(job, trainer):
        print_facts(main_console(), run_result(job, job.run.result()))
        return
    with config_keys_in_errors({"decoder": "data.decoder"}):
        device, probes = trainer.strategy.root_device, is_main_process()
        decoder = job.data.choose_decoder(device, before=job.run.decoder, probes=probes)
    norms, averaging = prepare_norms(job, trainer), prepare_averaging(job, trainer)
    with tracked(job, trainer) as resume:
        header = run_header(job, trainer, decoder=decoder, resume=resume)
        print_facts(main_console(), {**header, **norms, **averaging})
        fit(job, trainer, resume=resume)
        result = outcome(job, trainer)
        with stop_signals.deferred():
            if trainer.is_global_zero:
                job.run.finish(result)
            stop_signals.succeed()
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


def prepare_norms(job: Job, trainer: pl.Trainer) -> dict[str, str]:
    """Fit the averages of batch norms to a short training; say in words what changed, or how far a given one lags."""
    num_batches, is_given = trainer.max_steps * job.data.settings.accumulate, job.settings.norm_momentum is not None
    fitted = fit_momentum(job.module.net, num_batches, is_given=is_given)
    return {} if fitted is None else {"norms": fitted}


def check_choice(job: Job, trainer: pl.Trainer) -> None:
    """Raise ValueError when early stopping, or a configured metric, has no evaluation to depend on."""
    choice, dataset = job.settings.choice, job.data.dataset
    if choice.patience is None and choice.metric.name == TOP1.name:  # recipes set val_ema/top1, and all can do without
        return
    key, value = ("choose_by", choice.metric.key) if choice.patience is None else ("stop_early", choice.patience)
    no_split = f"needs an evaluation, and {dataset.name} has no split val or test: leave {key} out, or add a split"
    require(job.data.num_evaluation_images > 0, no_split, **{key: value})
    no_batch = f"needs an evaluation: leave {key} or trainer.limit_val_batches=0 out"
    require(trainer.limit_val_batches != 0, no_batch, **{key: value})
    few = f"needs more than five classes, and {dataset.name} has {len(dataset.classes)}: choose_by=top1 goes with any"
    require(choice.metric.name != TOP5.name or job.module.top_k == 5, few, choose_by=choice.metric.key)


def check_mixing(job: Job) -> None:
    """Raise ValueError where images are to be mixed and a batch has only one."""
    size, rule = job.data.settings.batch_size, "leaves an image no other to be mixed with: at least 2, or mix=none"
    require(job.module.recipe.mix is None or size > 1, rule, **{"data.batch_size": size})


def settle(job: Job, trainer: pl.Trainer) -> bool:
    """Do with a run in the folder what `again` says; return whether anything is left to train.

    Raises: ValueError for a run of other settings that must stay, or one that another process trains.
    """
    run, current = job.run, fingerprint_of(job, trainer)
    if job.settings.again == Again.REPLACE and not run.is_of(current):
        if is_main_process():
            moved = run.move_aside()
            print_line(main_console(), f"moved the run of other settings to {moved}")
        end = time.monotonic() + MOVE_SECONDS
        while not run.is_of(current) and time.monotonic() < end:  # on other ranks
            time.sleep(POLL_SECONDS)
    if not run.is_finished:
        return True
    run.check_settings(current)
    if is_main_process():
        run.finish(run.result())  # a newer file says that nothing has to be done again
    return False


@contextmanager
def tracked(job: Job, trainer: pl.Trainer) -> Iterator[Checkpoint | None]:
    """Create or continue the run's folder and its page on the dashboard; close both however the block ends.

    Yields the checkpoint from which the training continues, None for a new start.
    Raises: ValueError when the folder is locked, was started with other settings, or has only damaged checkpoints.
    """
    run, tracker = job.run, job.tracker
    current = fingerprint_of(job, trainer)
    run.check(current)
    if not is_main_process():
        yield run.newest_checkpoint().checkpoint
        return
    with run.locked():
        newest, damaged = run.newest_checkpoint()
        for sentence in damaged:
            print_line(main_console(), f"damaged: {sentence}")
        run.begin(current, job.settings.record)
        run.checkpoints.tidy(newest)
        start = -1 if newest is None else newest.step
        run.journal.truncate_after(start, length=None if newest is None else newest.journal_bytes)
        if newest is not None and run.journal.digest() != (newest.journal_bytes, newest.journal):
            lost = f"{run.journal.path} is not as it was at step {newest.step}: points before that are missing"
            print_line(main_console(), lost)
        write_status(run.status_file, State.TRAINING, step=max(start, 0))
        ending = Ending(State.FINISHED)
        try:
            print_missing(tracker.start(run, job.settings.parameters), run)
            if newest is None and tracker.shows_reports:
                # half a second each, for dashboards only
                from pipeline.train.augmented_images import record_augmented_images
                from pipeline.train.network_report import record_network_report

                record_network_report(job, precision=str(trainer.precision))
                record_augmented_images(job)
                tracker.update()
            yield newest
        except BaseException as error:
            ending = ending_of(error)
            raise
        finally:
            close(job, ending, step=max(start, trainer.global_step))


def close(job: Job, ending: Ending, *, step: int) -> None:
    """Write the ending of a training, and end its page on the dashboard."""
    with suppress(OSError):  # a full disk may be the end that this is about
        write_status(job.run.status_file, ending.state, step=step, reason=ending.reason, exit_code=ending.exit_code)
    print_missing(job.tracker.finish(ending.state), job.run)


def fingerprint_of(job: Job, trainer: pl.Trainer) -> Fingerprint:
    """Return the fingerprint of a training."""
    return fingerprint(
        job.settings.in_fingerprint,
        job.data.dataset,
        global_batch_size=job.data.images_per_step(trainer.world_size),
        precision=str(trainer.precision),
        decoder=job.data.gpu_decoder,
    )


def fit(job: Job, trainer: pl.Trainer, *, resume: Checkpoint | None) -> None:
    """Run Lightning's fit from a checkpoint, and turn its ends into user errors and exits of all ranks together."""
    watch = watch_ranks(job, trainer, resume=resume)
    os.environ |= end_with_me()  # for the ranks that Lightning starts
    path = None if resume is None else job.run.checkpoints.path / resume.file
    with stop_signals.deferred():
        watch.start()
        try:
            with config_keys_in_errors({"clip_norm": "recipe.clip_norm", "precision": "trainer.precision"}):
                trainer.fit(job.module, datamodule=job.data, ckpt_path=path, weights_only=True)
            saving = saving_of(trainer)
            saving.guard.check_evaluations(trainer, had_finite_loss=saving.had_finite_loss)
            watch.leave()
        except (Stopped, DivergedError, RanksDifferError) as end:  # on every rank
            watch.leave()
            if not trainer.is_global_zero:
                watch.wait_for_main()
                raise SystemExit(end.code if isinstance(end, Stopped) else exit_code(end)) from None
            if isinstance(end, Stopped):
                print_line(main_console(), f"stopped: the same command continues after step {end.step}")
            if isinstance(end, DivergedError) and end.samples:
                found = {"step": end.step, "samples": end.samples}
                write_atomically(job.run.folder / NONFINITE, json.dumps(found, indent=1).encode() + b"\n")
            raise
        except Exception as error:
            explained = explain_memory(error, batch_size=job.data.settings.batch_size)
            watch.explain(explained)  # of several ranks, none comes back from it
            if explained is error:
                raise
            raise explained from error
        finally:
            os.environ.pop(PARENT, None)


def watch_ranks(job: Job, trainer: pl.Trainer, *, resume: Checkpoint | None) -> RankWatch:
    """Add the watch over the ranks of a training to its callbacks."""

    def facts() -> Mapping[str, object]:
        return {**fingerprint_of(job, trainer), "steps": trainer.max_steps, "checkpoint": resume and resume.step}

    def close_alone(cause: str, code: int) -> None:
        for saving in trainer.checkpoint_callbacks:
            saving.on_exception(trainer, job.module, FailureError(cause))
        state = State.STOPPED if code in EXIT_CODES.values() else State.FAILED
        close(job, Ending(state, cause, code), step=max(resume.step if resume else 0, trainer.global_step))

    watch = RankWatch(
        job.run.folder / "ranks", facts, rank=trainer.global_rank, hang_seconds=job.settings.hang_seconds,
        close=close_alone,
    )  # fmt: skip
    attributes: Any = trainer  # whose callbacks have no type
    attributes.callbacks.insert(0, watch)
    launchers: Any = subprocess_script  # Lightning's observer would kill this process too, with signal 9
    launchers._launch_process_observer = watch.observe
    return watch


def explain_memory(error: Exception, *, batch_size: int) -> Exception:
    """Return advice for an error that means too little memory, otherwise the error."""
    memory = exhausted_memory(error) if isinstance(error, RuntimeError | MemoryError) else None
    if memory is None:
        return error
    pools = ", with DALI's pools" if memory == GPU_MEMORY else ""
    return ValueError(
        f"a batch of {batch_size} images does not fit into {memory}{pools}: "
        "lower data.batch_size, and raise recipe.accumulate by the same factor to keep the global batch"
    )
