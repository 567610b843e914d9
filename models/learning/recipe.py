"""Recipes, and the schedules of the learning rate.

Schedules depend on the completed fraction of the training, so that a recipe fits any number of epochs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from models.arguments import ArgumentError, Part, require
from models.learning.losses import Loss, cross_entropy

OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]  # takes parameter groups


class Schedule(Protocol):
    """From the optimizer step to a factor on the learning rate. Each has a `warmup_epochs`, which configs may set."""

    def __call__(self, step: int, *, steps_per_epoch: int, num_steps: int) -> float:
        """The factor at `step`, counted from 0, of `num_steps`."""


def _check_shape(loss: Loss) -> None:
    try:
        losses: object = loss(torch.zeros(2, 3), torch.tensor([0, 1]))
    except RuntimeError:
        return  # a loss with class weights takes another number of classes
    shape = tuple(getattr(losses, "shape", ()))
    if shape != (2,):
        raise ValueError(f"it must return one loss per image, (N,), and returns the shape {shape} for 2 images")


def _check(name: str, function: object, *, call: Callable[[], object]) -> None:
    """Call a configured function once. Raises: ArgumentError, with its name, when it refuses its arguments."""
    try:
        call()
    except (TypeError, ValueError) as error:
        target = getattr(function, "func", function)  # inside a partial
        parts = error.args if isinstance(error, ArgumentError) else [str(error)]
        reason: list[Part] = [one if isinstance(one, str) else (f"{name}.{one[0]}", one[1]) for one in parts]
        raise ArgumentError((name, getattr(target, "__name__", target)), ": ", *reason) from None


@dataclass(frozen=True)
class Recipe:
    """Epochs, optimizer, schedule and loss. An optimizer step takes `accumulate` batches.

    `optimizer` takes parameter groups; one of them sets its own weight decay of 0. `clip_norm` is the maximum norm of
    the gradient, None for no clipping. Raises: ValueError for impossible values.
    """

    epochs: int
    optimizer: OptimizerFactory
    schedule: Schedule
    accumulate: int = 1
    clip_norm: float | None = None
    loss: Loss = cross_entropy

    def __post_init__(self) -> None:
        _check("optimizer", self.optimizer, call=lambda: self.optimizer([{"params": [nn.Parameter(torch.zeros(1))]}]))
        _check("schedule", self.schedule, call=lambda: self.schedule(0, steps_per_epoch=1, num_steps=1))
        _check("loss", self.loss, call=lambda: _check_shape(self.loss))
        require(self.epochs >= 1, "must be at least 1", epochs=self.epochs)
        is_valid = self.clip_norm is None or (isinstance(self.clip_norm, int | float) and self.clip_norm > 0)
        require(is_valid, "must be a number above 0, or null for none", clip_norm=self.clip_norm)

    def rises_until_end(self, steps_per_epoch: int, num_steps: int) -> bool:
        """Return whether the learning rate still rises at the last of `num_steps` steps."""
        rate = partial(self.schedule, steps_per_epoch=steps_per_epoch, num_steps=num_steps)
        return num_steps > 1 and rate(num_steps - 1) > rate(num_steps - 2)


def _warm_up(step: int, warmup_steps: int, *, num_steps: int) -> tuple[float, float]:
    """Return the factor of the warm-up and the completed fraction of the steps after it, both from 0 to 1."""
    warmup_steps = min(warmup_steps, num_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps, 0.0
    return 1.0, min((step - warmup_steps) / max(1, num_steps - warmup_steps), 1.0)


def warmup_cosine(
    step: int, *, steps_per_epoch: int, num_steps: int, warmup_epochs: float = 5, final_fraction: float = 0.0
) -> float:
    """Rise linearly (Goyal et al. 2017, section 2.2), then fall by half a cosine (Loshchilov & Hutter 2017, eq. 5)."""
    rise, progress = _warm_up(step, round(warmup_epochs * steps_per_epoch), num_steps=num_steps)
    return rise * (final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * progress)) / 2)


def warmup_exponential(
    step: int, *, steps_per_epoch: int, num_steps: int, warmup_epochs: float = 5, final_fraction: float = 0.01
) -> float:
    """Rise linearly over `warmup_epochs`, then fall by a constant factor per step to `final_fraction` at the end.

    Tan & Le 2019, section 5.2, multiply by 0.97 every 2.4 epochs: 0.0118 is left after 350.
    """
    rise, progress = _warm_up(step, round(warmup_epochs * steps_per_epoch), num_steps=num_steps)
    return float(rise * final_fraction**progress)


def warmup_milestones(
    step: int,
    *,
    steps_per_epoch: int,
    num_steps: int,
    warmup_epochs: float = 0.0,
    milestones: Sequence[float] = (1 / 3, 2 / 3),
    factor: float = 0.1,
) -> float:
    """Rise linearly over `warmup_epochs`; multiply by `factor` at each of `milestones`, fractions of the training.

    Krizhevsky et al. 2012, section 5, and He et al. 2016, section 3.4, divide by 10 when the error stops falling;
    torchvision's references do so after 30 and 60 of 90 epochs.
    """
    rise, _ = _warm_up(step, round(warmup_epochs * steps_per_epoch), num_steps=num_steps)
    return rise * float(factor ** sum(step >= round(milestone * num_steps) for milestone in milestones))
