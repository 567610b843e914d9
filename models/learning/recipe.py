"""How to train: the values of a recipe, and the schedules of the learning rate.

A schedule is a function of how much of the training is done, so that a recipe fits any number of epochs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn


class Schedule(Protocol):
    """From the optimizer step to a factor on the learning rate."""

    def __call__(self, step: int, *, steps_per_epoch: int, num_steps: int) -> float:
        """The factor of a step of `num_steps`."""


@dataclass(frozen=True)
class Recipe:
    """How to train: epochs, optimizer, schedule, regularisation. `accumulate` batches make an optimizer step.

    `optimizer` takes parameter groups; its weight decay is left out where `Classifier.decays`
    says so. `clip_norm` is the largest norm of the gradient, None any.

    Raises: ValueError for values that no training can have.
    """

    epochs: int
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    schedule: Schedule
    accumulate: int = 1
    clip_norm: float | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        try:
            self.optimizer([{"params": [nn.Parameter(torch.zeros(1))]}])
            self.schedule(0, steps_per_epoch=1, num_steps=1)
        except TypeError as error:
            raise ValueError(f"recipe.optimizer or recipe.schedule: {error}") from error
        if self.epochs < 1:
            raise ValueError(f"recipe.epochs={self.epochs} must be at least 1")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"recipe.label_smoothing={self.label_smoothing} must be at least 0 and less than 1")
        if self.clip_norm is not None and not (isinstance(self.clip_norm, int | float) and self.clip_norm > 0):
            raise ValueError(f"recipe.clip_norm={self.clip_norm} must be a number above 0, or null for none")


def warmup_cosine(
    step: int, *, steps_per_epoch: int, num_steps: int, warmup_epochs: float = 5, final_fraction: float = 0.0
) -> float:
    """Rise linearly over `warmup_epochs`, then fall along half a cosine to `final_fraction`, step by step.

    Goyal et al. 2017, section 2.2; Loshchilov & Hutter 2017, equation 5, without restarts.
    """
    rise, progress = warm_up(step, round(warmup_epochs * steps_per_epoch), num_steps=num_steps)
    return rise * (final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * progress)) / 2)


def warmup_exponential(
    step: int, *, steps_per_epoch: int, num_steps: int, warmup_epochs: float = 5, final_fraction: float = 0.01
) -> float:
    """Rise linearly over `warmup_epochs`, then fall by the same factor each step, to `final_fraction` at the end.

    Tan & Le 2019, section 5.2, multiply by 0.97 every 2.4 epochs: 0.0118 is left after 350.
    """
    rise, progress = warm_up(step, round(warmup_epochs * steps_per_epoch), num_steps=num_steps)
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

    Krizhevsky et al. 2012, section 5, and He et al. 2016, section 3.4, divide by 10 when the error
    stops falling; torchvision's references do so after 30 and 60 of 90 epochs.
    """
    rise, _ = warm_up(step, round(warmup_epochs * steps_per_epoch), num_steps=num_steps)
    return rise * float(factor ** sum(step >= round(milestone * num_steps) for milestone in milestones))


def warm_up(step: int, warmup_steps: int, *, num_steps: int) -> tuple[float, float]:
    """How far the learning rate has risen, and how much of the rest of the training is done; both from 0 to 1."""
    warmup_steps = min(warmup_steps, num_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps, 0.0
    return 1.0, min((step - warmup_steps) / max(1, num_steps - warmup_steps), 1.0)
