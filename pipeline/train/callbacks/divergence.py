"""A loss or a gradient that is not finite ends the training, or its step is skipped."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from data.loading.datamodule import ShardData
from models.arguments import require
from pipeline.train.callbacks.ranks import gather
from pipeline.train.ends import DivergedError

CHOICES = ("stop", "skip")
LOWER = "lower recipe.optimizer.lr"
ADVICE = f"{LOWER}, or add on_nonfinite=skip to leave out such steps"
MAX_LINES = 10  # about skipped steps


class _Found(NamedTuple):
    what: str  # loss or gradient
    step: int  # counted from 1
    samples: list[str]


class GuardFinite(pl.Callback):
    """Check the loss of every batch and the gradients of every step.

    On a CPU, and with "skip", before the optimizer's step. On a GPU without a wait: each step adds to a flag on the
    device, which `StopTogether` reads with its own, and `check` before a save; no weights that come of it are saved.
    "skip" leaves out the step on every rank, and restores the statistics of batch norm. With a gradient scaler, whose
    gradients overflow by design, only losses count. Raises: ValueError for another choice.
    """

    def __init__(self, on_nonfinite: str, *, data: ShardData, report: Callable[[str], None]) -> None:
        require(on_nonfinite in CHOICES, f"is not one of {', '.join(CHOICES)}", on_nonfinite=on_nonfinite)
        self.skips, self.data, self.report = on_nonfinite == "skip", data, report
        self.num_skipped = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the flags on the device."""
        device = pl_module.device
        self.found = torch.zeros(2, device=device)  # not finite since the last check: a loss of this rank, a gradient
        self._first = torch.full((2,), -1, device=device)  # steps at which each was found first, counted from 1
        self._one = torch.ones(1, device=device)
        self._waits = self.skips or device.type == "cpu"
        self._has_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._buffers = list(pl_module.buffers()) if self.skips else []
        self._before: list[Tensor] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *rest: object) -> None:
        """Keep the buffers that a forward pass changes, for a step that is skipped."""
        if self._buffers and not trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches:
            self._before = [one.clone() for one in self._buffers]

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Note a loss that is not finite; its gradient becomes NaN, so that every rank has it after the reduction."""
        if not self._waits:
            self.found[0] += ~torch.isfinite(loss.detach())
        elif not math.isfinite(loss.item()):
            self.found[0] = 1
            loss.register_hook(lambda gradient: gradient * math.nan)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Check the gradients, which are the same on every rank. Raises: DivergedError."""
        parameters = [one for group in optimizer.param_groups for one in group["params"] if one.grad is not None]
        if not self._has_scaler:
            by_dtype: dict[torch.dtype, list[Tensor]] = {}
            for parameter in parameters:
                by_dtype.setdefault(parameter.dtype, []).append(parameter.grad)
            for gradients in by_dtype.values():
                # That of torch's own gradient scaler, with a scale of 1: a fifth of the time of norms.
                torch._amp_foreach_non_finite_check_and_unscale_(gradients, self.found[1:], self._one)
        if not self._waits:
            is_first = (self.found > 0) & (self._first < 0)
            self._first = torch.where(is_first, trainer.global_step + 1, self._first)
        elif self.found.any():
            self._first = torch.where(self.found > 0, trainer.global_step + 1, -1)
            if self.skips:
                self._skip(trainer, parameters)
            else:
                self.check(trainer)

    def check(self, trainer: pl.Trainer) -> None:
        """Raise DivergedError on every rank if any has found something. Every rank must call it at the same point."""
        found = self._found_by_all(trainer)
        if found is not None:
            rate = self._learning_rate(trainer, found.step)
            finding = f"step {found.step} has a {found.what} that is not finite"
            raise DivergedError(finding, step=found.step, learning_rate=rate, samples=found.samples, advice=ADVICE)

    def check_evaluations(self, trainer: pl.Trainer, *, had_finite_loss: bool | None) -> None:
        """Raise DivergedError, on every rank, at the end of a training without an evaluation whose loss was finite."""
        if had_finite_loss is False:
            step = trainer.global_step
            rate = self._learning_rate(trainer, step)
            finding = f"no evaluation up to step {step} had a finite loss"
            raise DivergedError(finding, step=step, learning_rate=rate, advice=LOWER)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of skipped steps."""
        return {"skipped": self.num_skipped} if self.num_skipped else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the count."""
        self.num_skipped = state_dict["skipped"]

    def _skip(self, trainer: pl.Trainer, parameters: list[torch.nn.Parameter]) -> None:
        """Take the gradients away, with which an optimizer leaves weights and momentum as they are."""
        self.num_skipped += 1
        if not self._has_scaler:  # which skips by itself, and needs the gradients for that
            for parameter in parameters:
                parameter.grad = None
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._before)
        if self.num_skipped <= MAX_LINES and not self._has_scaler:  # whose gradients differ between ranks
            found = self._found_by_all(trainer)
            assert found is not None
            names = ", ".join(found.samples[:3])
            last = "; further ones are only counted" if self.num_skipped == MAX_LINES else ""
            self.report(f"skipped step {found.step}: its {found.what} is not finite ({names}, ...){last}")
        self.found.zero_()
        self._first.fill_(-1)

    def _found_by_all(self, trainer: pl.Trainer) -> "_Found | None":
        """Return the first finding of any rank; the samples are those of the ranks whose loss is not finite, or all."""
        mine = tuple(self._first.tolist())
        firsts = [mine] if trainer.world_size == 1 else gather(mine)
        found = [step for steps in firsts for step in steps if step >= 0]
        if not found:
            return None
        step = int(min(found))
        ranks = [rank for rank, (loss, _) in enumerate(firsts) if loss == step]
        names = self._names(trainer, step, ranks=ranks or list(range(trainer.world_size)))
        return _Found("loss" if ranks else "gradient", step, names)

    def _names(self, trainer: pl.Trainer, step: int, *, ranks: list[int]) -> list[str]:
        """Return the samples of an optimizer step, counted from 1, on these ranks."""
        accumulate = trainer.accumulate_grad_batches
        epoch, number = divmod(step - 1, int(trainer.num_training_batches) // accumulate)
        batches = range(number * accumulate, (number + 1) * accumulate)
        samples = list[int]()
        for rank in ranks:
            plan = self.data.training_plan(rank, trainer.world_size)
            for batch in batches:
                samples += plan.samples(epoch, batch).tolist()
        return self.data.training_index.keys(samples)

    @staticmethod
    def _learning_rate(trainer: pl.Trainer, step: int) -> float:
        """Return the learning rate of a step, counted from 1: the current one where that step is about to be taken."""
        scheduler: Any = trainer.lr_scheduler_configs[0].scheduler
        return float(scheduler.base_lrs[0] * scheduler.lr_lambdas[0](step - 1))
