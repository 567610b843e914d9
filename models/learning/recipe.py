"""Recipes: epochs, optimizer, learning rate, schedule, loss and mixing of a training."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.arguments import ArgumentError, Part, require
from models.learning.losses import Loss, cross_entropy, one_hot
from models.learning.mixing import Mixing
from models.learning.schedules import Schedule

OptimizerFactory = Callable[..., torch.optim.Optimizer]  # takes parameter groups, and maybe `lr`
MAX_EPOCHS = 1_000_000
SMALL_RATE = 1e-3
POWERS = {"linear": 1.0, "sqrt": 0.5, "none": 0.0}  # of the ratio of two batch sizes, by scaling of the learning rate


class LearningRate(NamedTuple):
    """The highest learning rate of a training, and how it came about."""

    value: float
    origin: str


def computes_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a step needs a function that computes gradients, because they are those at other weights."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _check_loss(loss: Loss, *, mixes: bool) -> None:
    """Raise ValueError unless a loss returns one value per image, where `mixes` also for labels as probabilities."""
    logits, labels = torch.eye(2, 3), torch.tensor([0, 2])
    try:
        losses: object = loss(logits, labels)
    except RuntimeError:
        return  # a loss with class weights takes another number of classes
    shape = tuple(getattr(losses, "shape", ()))
    if shape != (2,):
        raise ValueError(f"it must return one loss per image, (N,), and returns the shape {shape} for 2 images")
    if mixes and not _takes_probabilities(loss, logits, labels=labels):
        known = "cross_entropy, label_smoothing and binary_cross_entropy"
        raise ValueError(f"mixed images need a loss that takes probabilities (N, K) as labels, such as {known}")


def _takes_probabilities(loss: Loss, logits: Tensor, *, labels: Tensor) -> bool:
    """Return whether a loss is the same for labels and for probabilities of 1 of these labels."""
    probabilities = one_hot(labels, logits.shape[1])
    try:
        return torch.allclose(loss(logits, probabilities), loss(logits, labels))
    except (RuntimeError, IndexError, TypeError, ValueError):
        return False


def _check(name: str, function: object, *, call: Callable[[], object]) -> None:
    """Call a configured function once. Raises: ArgumentError, with its name, when it refuses its arguments."""
    try:
        call()
    except (IndexError, TypeError, ValueError) as error:
        target = getattr(function, "func", function)  # inside a partial
        parts = error.args if isinstance(error, ArgumentError) else [str(error)]
        reason: list[Part] = [one if isinstance(one, str) else (f"{name}.{one[0]}", one[1]) for one in parts]
        raise ArgumentError((name, getattr(target, "__name__", target)), ": ", *reason) from None


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _take_step(factory: OptimizerFactory) -> None:
    """Take a step of an optimizer with a small matrix. Raises: ValueError for arguments with which it cannot."""
    matrix = nn.Parameter(torch.eye(4, device="cpu"))  # also where a network is built without its weights
    optimizer = factory([{"params": [matrix]}])
    for group in optimizer.param_groups:
        group["lr"] = SMALL_RATE  # a rate that is too high is for the training to find out

    def compute_gradients() -> float:
        matrix.grad = torch.full_like(matrix, 0.5)
        return 0.0

    try:
        for _ in range(2):  # the second one uses what the first has left
            optimizer.step(compute_gradients)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    if not matrix.isfinite().all():
        raise ValueError("a step with a gradient of 0.5 makes weights that are not finite")


@dataclass(frozen=True)
class Recipe:
    """Epochs, optimizer, learning rate, schedule, loss and mixing. An optimizer step takes `accumulate` batches.

    `optimizer` takes parameter groups; one of them sets its own weight decay of 0. Unless it is a partial with an `lr`,
    the learning rate is `base_lr`, which is made for `base_batch_size` images a step and scaled to another number by
    their ratio (`lr_scaling` "linear", Goyal et al. 2017, section 2.1), its root ("sqrt", Malladi et al. 2022), or not
    at all ("none"); without a `base_lr` it is the optimizer's default. It rises linearly (Goyal et al. 2017, section
    2.2) over `warmup`, a fraction of the steps, or over `warmup_epochs` or `warmup_steps`; then `schedule` multiplies
    it. `clip_norm` is the maximum norm of the gradient, None for no clipping; `mix` mixes images, None for none.

    `layer_decay` is the learning rate of a stage relative to the next one, `freeze` names parts of the network that do
    not train, and during `head_warmup`, a fraction of the steps, only the head does.
    Raises: ValueError for impossible values.
    """

    epochs: int
    optimizer: OptimizerFactory
    schedule: Schedule
    base_lr: float | None = None
    base_batch_size: int = 256
    lr_scaling: str = "none"
    warmup: float = 0.0
    warmup_epochs: float | None = None
    warmup_steps: int | None = None
    accumulate: int = 1
    clip_norm: float | None = None
    loss: Loss = cross_entropy
    mix: Mixing | None = None
    layer_decay: float | None = None
    head_warmup: float | None = None
    freeze: Sequence[str] | None = None

    def __post_init__(self) -> None:
        require(1 <= self.epochs <= MAX_EPOCHS, f"must be from 1 to {MAX_EPOCHS:,}", epochs=self.epochs)
        self._check_learning_rate()
        self._check_warmup()
        self._check_finetuning()
        require(self.mix is None or isinstance(self.mix, Mixing), "must be chosen by mix=, or null", mix=self.mix)
        _check("optimizer", self.optimizer, call=lambda: _take_step(self.optimizer_factory()))
        rule = "does not go with an optimizer that needs all gradients of a step at once: use 1"
        require(self.accumulate == 1 or not self.computes_gradients, rule, accumulate=self.accumulate)
        _check("schedule", self.schedule, call=self._check_schedule)
        _check("loss", self.loss, call=lambda: _check_loss(self.loss, mixes=self.mix is not None))
        rule = "must be a number above 0, or null for none"
        require(self.clip_norm is None or _is_positive(self.clip_norm), rule, clip_norm=self.clip_norm)

    def _check_schedule(self) -> None:
        for progress in (0.0, 0.5, 1.0):
            factor = self.schedule(progress)
            is_rate = isinstance(factor, int | float) and 0 <= factor < math.inf
            require(is_rate, f"must be a factor of at least 0, after {progress:.0%} of the training", schedule=factor)

    def _check_learning_rate(self) -> None:
        given, rule = self._given_lr, "must be a number, or null for base_lr"
        is_number = isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given)
        require(given is None or is_number, rule, **{"optimizer.lr": given})
        rule = "must be a number above 0, or null for the optimizer's default"
        require(self.base_lr is None or _is_positive(self.base_lr), rule, base_lr=self.base_lr)
        require(_is_positive(self.base_batch_size), "must be at least 1", base_batch_size=self.base_batch_size)
        is_known = isinstance(self.lr_scaling, str) and self.lr_scaling in POWERS
        require(is_known, f"is not one of {', '.join(POWERS)}", lr_scaling=self.lr_scaling)

    def _check_warmup(self) -> None:
        require(0 <= self.warmup <= 1, "must be a fraction of the training, from 0 to 1", warmup=self.warmup)
        lengths = {"warmup_epochs": self.warmup_epochs, "warmup_steps": self.warmup_steps}
        for name, value in lengths.items():
            rule = "must be a number of at least 0, or null for the fraction"
            require(value is None or value == 0 or _is_positive(value), rule, **{name: value})
        steps, rule = self.warmup_steps, "must be an integer of at least 0, or null for the fraction"
        require(steps is None or float(steps).is_integer(), rule, warmup_steps=steps)
        require(None in lengths.values(), "does not go with warmup_epochs: choose one", warmup_steps=self.warmup_steps)

    def _check_finetuning(self) -> None:
        decay, alone = self.layer_decay, self.head_warmup
        rule = "must be a number above 0 and at most 1, or null for one rate"
        require(decay is None or (_is_positive(decay) and decay <= 1), rule, layer_decay=decay)
        rule = "must be a fraction of the training, at least 0 and less than 1"
        require(alone is None or alone == 0 or (_is_positive(alone) and alone < 1), rule, head_warmup=alone)
        is_list = isinstance(self.freeze, list | tuple) and all(isinstance(name, str) for name in self.freeze)
        rule = "must be a list of parts of the network, as in [stem,stage1], or null"
        require(self.freeze is None or is_list, rule, freeze=self.freeze)

    @property
    def computes_gradients(self) -> bool:
        """Whether a step of the optimizer needs a function that computes gradients."""
        return computes_gradients(self.optimizer_factory()([{"params": [nn.Parameter(torch.zeros(1))]}]))

    @property
    def _given_lr(self) -> float | None:
        return self.optimizer.keywords.get("lr") if isinstance(self.optimizer, partial) else None

    def learning_rate(self, images_per_step: int | None = None) -> LearningRate | None:
        """Return the rate for steps of so many images (None: `base_batch_size`); None where the optimizer decides."""
        given = self._given_lr
        if given is not None:
            return LearningRate(given, "as given")
        if self.base_lr is None:
            return None
        images = self.base_batch_size if images_per_step is None else images_per_step
        value = self.base_lr * (images / self.base_batch_size) ** POWERS[self.lr_scaling]
        origin = f"{self.base_lr:g} for {self.base_batch_size:,} images a step"
        if images != self.base_batch_size:
            how = {"linear": "by their ratio", "sqrt": "by the root of their ratio"}.get(self.lr_scaling)
            origin += f", not scaled to {images:,}" if how is None else f", scaled to {images:,} {how}"
        return LearningRate(value, origin)

    def optimizer_factory(self, images_per_step: int | None = None) -> OptimizerFactory:
        """Return `optimizer` with the learning rate for steps of so many images."""
        rate = self.learning_rate(images_per_step)
        return self.optimizer if rate is None else partial(self.optimizer, lr=rate.value)

    def lr_factor(self, step: int, *, steps_per_epoch: int, num_steps: int) -> float:
        """Return the factor on the learning rate at `step`, counted from 0, of `num_steps`."""
        rise = self._count_warmup_steps(steps_per_epoch, num_steps)
        if step < rise:
            return (step + 1) / rise * self.schedule(0.0)
        return self.schedule(min((step - rise) / max(1, num_steps - rise), 1.0))

    def body_lr_factor(self, step: int, *, steps_per_epoch: int, num_steps: int) -> float:
        """Return the factor for everything but the head: 0 while the head trains alone, after which it rises again.

        Howard & Ruder 2018, section 3.3, whose gradual unfreezing has more stages.
        """
        alone = self.count_head_steps(num_steps)
        if step < alone:
            return 0.0
        rise = self._count_warmup_steps(steps_per_epoch, num_steps) if alone else 0
        share = min((step - alone + 1) / max(rise, 1), 1.0)
        return share * self.lr_factor(step, steps_per_epoch=steps_per_epoch, num_steps=num_steps)

    def count_head_steps(self, num_steps: int) -> int:
        """Return the number of steps, of `num_steps`, in which only the head trains."""
        return round((self.head_warmup or 0) * num_steps)

    def _count_warmup_steps(self, steps_per_epoch: int, num_steps: int) -> int:
        if self.warmup_steps is not None:
            length = float(self.warmup_steps)
        else:
            epochs = self.warmup_epochs
            length = self.warmup * num_steps if epochs is None else epochs * steps_per_epoch
        return min(round(length), num_steps)

    @property
    def falls_in_vain(self) -> bool:
        """Whether the learning rate falls under an optimizer that is made for a constant one."""
        return self.schedule(1.0) < self.schedule(0.0) and self.computes_gradients

    def rises_until_end(self, steps_per_epoch: int, num_steps: int) -> bool:
        """Return whether the learning rate still rises at the last of `num_steps` steps."""
        factor = partial(self.lr_factor, steps_per_epoch=steps_per_epoch, num_steps=num_steps)
        return num_steps > 1 and factor(num_steps - 1) > factor(num_steps - 2)
