"""The moving average of a training's weights: set up, or left out where the training is too short."""

import pytorch_lightning as pl

from models.arguments import require
from models.learning.averaging import AveragedWeights
from models.learning.evaluation import AVERAGED, RAW
from pipeline.train.callbacks.early_stopping import StopEarly
from pipeline.train.callbacks.saving import SaveCheckpoints
from pipeline.train.job import Job

HALVES = ("16-true", "bf16-true")  # precisions whose weights are too coarse for the small steps of an average


def prepare_averaging(job: Job, trainer: pl.Trainer) -> dict[str, str]:
    """Average the weights where the config says so and the training is long enough; say so in words.

    Raises: ValueError for weights in half precision.
    """
    averaging, num_steps, choice = job.averaging, trainer.max_steps, job.settings.choice
    if averaging is None:
        return {}
    rule = "has weights that are too coarse to be averaged: take bf16-mixed or 32-true, or averaging=none"
    require(trainer.precision not in HALVES, rule, **{"trainer.precision": trainer.precision})
    window = f"{averaging.window(num_steps):,.0f}"
    if not averaging.is_long_enough(num_steps):
        few = f"off: {num_steps:,} steps are fewer than {averaging.min_windows:g} windows of {window} steps"
        if choice.metric.is_averaged:
            _choose_by_raw_weights(job, trainer)
            few += f"; {job.settings.choice.metric.key} chooses instead of {choice.metric.key}"
        return {"averaging": few}
    job.module.average = AveragedWeights(job.module.net, averaging, is_chosen=choice.metric.is_averaged)
    kept = "" if choice.metric.is_averaged else f"; choose_by={choice.metric.of(AVERAGED).key} keeps them in best.ckpt"
    return {"averaging": f"weights of about the last {window} steps at the end{kept}"}


def _choose_by_raw_weights(job: Job, trainer: pl.Trainer) -> None:
    choice = job.settings.choice
    job.settings.choice = choice._replace(metric=choice.metric.of(RAW))
    for callback in (*trainer.checkpoint_callbacks, *trainer.early_stopping_callbacks):
        if isinstance(callback, SaveCheckpoints | StopEarly):
            callback.monitor = job.settings.choice.metric.key
