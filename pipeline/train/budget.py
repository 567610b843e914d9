"""`budget`: the number of epochs that fit into a time, measured once and recorded with the run."""

import copy
import json
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import count, islice

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import Tensor

from data.loading.loader import Batch, Loader
from models.learning.averaging import AveragedWeights
from models.learning.classifier import Classifier
from pipeline.build.first_rank import answer_of_first_rank
from pipeline.build.network import build_recipe
from pipeline.build.settings import Again, parse_budget
from pipeline.build.trainer import build_trainer, limit_threads
from pipeline.cli.console import main_console, print_facts
from pipeline.cli.errors import config_keys_in_errors
from pipeline.train.callbacks.compiling import compile_network
from pipeline.train.fit import check_mixing, explain_memory, limit_epoch
from pipeline.train.job import Job, build_job

UNTIMED, TIMED = 3, 12  # batches, at least; the first ones allocate memory and fill queues


def settle_epochs(config: DictConfig, job: Job, *, num_classes: int) -> Job:
    """Return a job with as many epochs as the config's `budget` allows, at least one; without a budget, the same job.

    A run that has begun keeps its number, with which it continues to the same bits; rank 0 measures for a new one.
    Raises: ValueError for a budget that is no time.
    """
    if config.budget is None:
        return job
    check_mixing(job)
    config.recipe.epochs = int(answer_of_first_rank(lambda: str(_recorded_epochs(job) or _choose_epochs(config, job))))
    job.module.recipe = build_recipe(config)
    return build_job(config, job.module, data=job.data, num_classes=num_classes)


def _recorded_epochs(job: Job) -> int | None:
    """Return the epochs of the run in the folder, None for a new run, or where this one replaces it."""
    if not job.run.fingerprint_file.is_file():
        return None
    recorded, own = job.run.fingerprint(), json.loads(json.dumps(job.settings.in_fingerprint))
    epochs = recorded.get("recipe.epochs")
    differs = any(recorded.get(name) != value for name, value in {**own, "recipe.epochs": epochs}.items())
    is_replaced = differs and job.settings.again == Again.REPLACE
    if recorded.get("budget") != own["budget"] or not isinstance(epochs, int) or is_replaced:
        return None
    print_facts(main_console(), {"budget": f"{own['budget']}: {epochs} epochs, as the run began"})
    return epochs


def _choose_epochs(config: DictConfig, job: Job) -> int:
    trainer = build_trainer(config, job.module, callbacks=[], plugins=[], folder=job.run.folder)
    limit_threads(int(os.environ.get("LOCAL_WORLD_SIZE", trainer.num_devices)))
    try:
        seconds = measure_epoch(job, trainer)
    except (RuntimeError, MemoryError) as error:
        explained = explain_memory(error, batch_size=job.data.settings.batch_size)
        if explained is error:
            raise
        raise explained from error
    epochs = max(1, int(parse_budget(config.budget) / seconds))
    print_facts(main_console(), {"budget": f"{config.budget}: {epochs} epochs of {seconds:.3g} s, as measured"})
    return epochs


def measure_epoch(job: Job, trainer: pl.Trainer) -> float:
    """Return the seconds of an epoch with its share of the evaluations, from a few batches on a copy of the network.

    The start, compilation, checkpoints and the reduction of gradients over ranks are not in it.
    """
    data, device = job.data, trainer.strategy.root_device
    limit_epoch(trainer, data, num_epochs=1)
    data.trainer = trainer
    data.choose_decoder(device, before=job.run.decoder, probes=True)
    evaluation, rehearsal = data.val_dataloader(), Rehearsal(job, trainer)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        num_batches, accumulate = int(trainer.limit_train_batches), job.module.recipe.accumulate
        batches = data.train_dataloader()
        seconds = num_batches * _seconds_a_batch(rehearsal.train, batches, device=device, multiple=accumulate)
        rehearsal.module.eval()
        limit = trainer.limit_val_batches  # a number, or a share as a float
        if isinstance(evaluation, Loader) and limit:
            share = min(limit, len(evaluation)) if isinstance(limit, int) else limit * len(evaluation)
            times = _evaluations_an_epoch(trainer, num_batches)
            seconds += times * share * _seconds_a_batch(rehearsal.evaluate, evaluation, device=device)
    data.limit_batches = None
    return seconds


class Rehearsal:
    """A copy of a training's network, optimizer and average, which takes single batches and saves nothing."""

    def __init__(self, job: Job, trainer: pl.Trainer) -> None:
        self.precision = trainer.precision_plugin
        module = self.precision.convert_module(copy.deepcopy(job.module)).to(trainer.strategy.root_device)
        assert isinstance(module, Classifier)
        module.batch_key = 0  # for mixed images
        if job.averaging is not None:
            module.average = AveragedWeights(module.net, job.averaging)
            module.average.follow()
        if job.settings.compile:
            with config_keys_in_errors({"compile": "trainer.compile"}):
                compile_network(module, job.settings.compile)
        factory = module.optimizer_factory(str(trainer.precision))
        self.module, self.optimizer = module, factory([group.options for group in module.rate_groups()])
        self._numbers = count(1)

    def train(self, batch: Batch) -> None:
        """Compute gradients, and after as many batches as the recipe accumulates take a step."""
        step, rest = divmod(next(self._numbers), self.module.recipe.accumulate)
        if rest:
            self._gradients(batch)
            return
        self.optimizer.step(partial(self._gradients, batch, clip_norm=self.module.recipe.clip_norm))
        self.optimizer.zero_grad()
        if self.module.average is not None:
            self.module.average.update(step)

    def evaluate(self, batch: Batch) -> None:
        """Count hits and losses, also with averaged weights."""
        with torch.no_grad(), self.precision.forward_context():
            self.module.validation_step(self.precision.convert_input(batch), 0)

    def _gradients(self, batch: Batch, clip_norm: float | None = None) -> float:
        with self.precision.forward_context():
            loss: Tensor = self.module.training_step(self.precision.convert_input(batch), 0)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), clip_norm)
        return 0.0  # no optimizer reads it


def _evaluations_an_epoch(trainer: pl.Trainer, num_batches: int) -> float:
    interval = trainer.val_check_interval  # batches, or a share of an epoch as a float
    times = num_batches / interval if isinstance(interval, int) else 1 / interval
    return times / (trainer.check_val_every_n_epoch or 1)


def _seconds_a_batch(
    step: Callable[[Batch], None], batches: Iterable[Batch], *, device: torch.device, multiple: int = 1
) -> float:
    """Return the mean over a multiple of so many batches, of which one is a step of the optimizer."""
    untimed, timed = (-(-number // multiple) * multiple for number in (UNTIMED, TIMED))
    times = [time.perf_counter()]
    for batch in islice(batches, untimed + timed):
        step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter())
    times = times[min(untimed, len(times) - 1 - multiple) :]
    return (times[-1] - times[0]) / (len(times) - 1)
