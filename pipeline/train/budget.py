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
from pipeline.train.fit import check_mixing, explain_memory, limit_epoch
from pipeline.train.job import Job, build_job

UNTIMED, TIMED = 3, 12  # batches; the first ones allocate memory and fill queues


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
    """Return the seconds of an epoch with its evaluation, from a few batches on a copy of the network.

    Gradients are not reduced over ranks and nothing is saved; an evaluation also takes averaged weights, if configured.
    """
    data, device = job.data, trainer.strategy.root_device
    limit_epoch(trainer, data, num_epochs=1)
    data.trainer = trainer
    data.choose_decoder(device, before=job.run.decoder, probes=True)
    precision, evaluation = trainer.precision_plugin, data.val_dataloader()
    module = precision.convert_module(copy.deepcopy(job.module)).to(device)
    assert isinstance(module, Classifier)
    module.batch_key = 0  # for mixed images
    if job.averaging is not None:
        module.average = AveragedWeights(module.net, job.averaging)
        module.average.follow()
    optimizer = module.optimizer_factory(str(trainer.precision))([group.options for group in module.rate_groups()])
    numbers = count(1)

    def gradients(batch: Batch) -> float:
        with precision.forward_context():
            loss: Tensor = module.training_step(precision.convert_input(batch), 0)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return 0.0  # no optimizer reads it

    def train(batch: Batch) -> None:
        if next(numbers) % module.recipe.accumulate:
            gradients(batch)
        else:
            optimizer.step(partial(gradients, batch))
            optimizer.zero_grad()

    def evaluate(batch: Batch) -> None:
        with torch.no_grad(), precision.forward_context():
            module.validation_step(precision.convert_input(batch), 0)

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        seconds = int(trainer.limit_train_batches) * _seconds_a_batch(train, data.train_dataloader(), device=device)
        module.eval()
        limit = trainer.limit_val_batches  # a number, or a share as a float
        if isinstance(evaluation, Loader) and limit:
            num_batches = min(limit, len(evaluation)) if isinstance(limit, int) else limit * len(evaluation)
            seconds += num_batches * _seconds_a_batch(evaluate, evaluation, device=device)
    data.limit_batches = None
    return seconds


def _seconds_a_batch(step: Callable[[Batch], None], batches: Iterable[Batch], *, device: torch.device) -> float:
    times = [time.perf_counter()]
    for batch in islice(batches, UNTIMED + TIMED):
        step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter())
    times = times[min(UNTIMED, len(times) - 2) :]
    return (times[-1] - times[0]) / (len(times) - 1)
