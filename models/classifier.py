"""The Lightning modules: how a network learns to classify, apart from what the network is.

`Classifier` holds the one training and evaluation step; a subclass a family states
what that family's papers do differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from models.residual import BasicBlock, Bottleneck

UNSUMMED_STEPS = 64


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
    warmup_steps = min(round(warmup_epochs * steps_per_epoch), num_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


class TrainingMetrics(NamedTuple):
    """Means over the images since they were last taken, on all ranks; top5 is None with five classes or fewer."""

    loss: float
    top1: float
    top5: float | None


class Classifier(pl.LightningModule):
    """A network with cross-entropy, top-1 and top-5, and the optimizer of a recipe.

    `net` maps images (N, C, H, W) to logits (N, K); the module trains it in
    channels_last memory.
    """

    def __init__(self, net: nn.Module, *, num_classes: int, recipe: Recipe) -> None:
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)
        self.recipe = recipe
        self.top_k = 5 if num_classes > 5 else 1
        self.initialize()
        # Images, loss, top-1 hits, top-k hits since the last take. No buffer: DDP overwrites those with rank 0's.
        self._train_sums: Tensor | None = None
        self._unsummed: list[tuple[Tensor, Tensor]] = []  # losses (N,) and hits (N, top_k) of the latest steps
        self.evaluated_images = 0  # of all ranks, in the last evaluation
        self.val_images = SumMetric().set_dtype(torch.float64)
        self.val_loss = MeanMetric().set_dtype(torch.float64)
        self.val_top1 = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.val_top5 = MulticlassAccuracy(num_classes, average="micro", top_k=self.top_k, validate_args=False)

    def initialize(self) -> None:
        """Set the first weights where the family's papers depart from torch's own; here they do not."""

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies: to kernels and matrices, not to norms and biases (He et al. 2019, 3.1)."""
        return parameter.ndim > 1

    def forward(self, images: Tensor) -> Tensor:
        """Shapes: (N, C, H, W) -> (N, K)."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_index: int) -> Tensor:
        """The mean loss of a batch of images (N, C, H, W), labels (N,) and samples (N,)."""
        logits, losses = self._step(batch, self.recipe.label_smoothing)
        with torch.no_grad():
            hits = logits.topk(self.top_k).indices == batch[1][:, None]  # (N, top_k)
        # Summed once in many steps: on a small network the sums of every step would cost as much as a layer.
        self._unsummed.append((losses.detach(), hits))
        if len(self._unsummed) == UNSUMMED_STEPS:
            self._sum_up()
        return losses.mean()

    def on_validation_start(self) -> None:
        """Give every rank the batch-norm statistics of rank 0: those that the checkpoint holds."""
        if self.trainer.world_size > 1:
            for buffer in self.net.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_index: int) -> None:
        """Count the hits and losses of a batch; the loss is plain cross-entropy, so that recipes compare."""
        logits, losses = self._step(batch, 0.0)
        self.val_images.update(len(losses))
        self.val_loss.update(losses)
        self.val_top1.update(logits, batch[1])
        if self.top_k == 5:
            self.val_top5.update(logits, batch[1])

    def on_validation_epoch_end(self) -> None:
        """Log the counts of all ranks together."""
        self.evaluated_images = int(self.val_images.compute())
        self.log("val/loss", self.val_loss.compute().to(torch.float32))
        self.log("val/top1", self.val_top1.compute())
        if self.top_k == 5:
            self.log("val/top5", self.val_top5.compute())
        for metric in (self.val_images, self.val_loss, self.val_top1, self.val_top5):
            metric.reset()

    def take_training_metrics(self) -> TrainingMetrics:
        """Means since the last call, over all ranks: every rank must call it at the same step."""
        self._sum_up()
        assert self._train_sums is not None, "no training step since the last call"
        images, loss, top1, topk = self._over_ranks(self._train_sums).tolist()
        self._train_sums = None
        return TrainingMetrics(loss / images, top1 / images, topk / images if self.top_k == 5 else None)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the sums since the last take, of all ranks: the next point of the curve is of all its steps."""
        self._sum_up()
        checkpoint["train_sums"] = None if self._train_sums is None else self._over_ranks(self._train_sums)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the sums of all ranks, on the first of them."""
        sums = checkpoint.get("train_sums")
        self._train_sums = sums if sums is None or self.global_rank == 0 else torch.zeros_like(sums)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The recipe's optimizer with and without weight decay, and its schedule by optimizer step."""
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.named_parameters():
            groups[self.decays(name, parameter)].append(parameter)
        optimizer = self.recipe.optimizer([{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}])
        num_steps = int(self.trainer.estimated_stepping_batches)
        steps_per_epoch = num_steps // self.recipe.epochs
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: self.recipe.schedule(step, steps_per_epoch=steps_per_epoch, num_steps=num_steps),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _over_ranks(self, sums: Tensor) -> Tensor:
        total = self.trainer.strategy.reduce(sums.to(self.device, copy=True), reduce_op="sum")  # it works in place
        assert isinstance(total, Tensor)
        return total

    def _sum_up(self) -> None:
        if self._unsummed:
            losses, hits = (torch.cat(parts).double() for parts in zip(*self._unsummed, strict=True))
            count = losses.new_tensor(len(losses))
            sums = torch.stack([count, losses.sum(), hits[:, 0].sum(), hits.sum()])
            self._train_sums = sums if self._train_sums is None else self._train_sums.to(sums.device) + sums
            self._unsummed.clear()

    def _step(self, batch: tuple[Tensor, Tensor, Tensor], label_smoothing: float) -> tuple[Tensor, Tensor]:
        images, labels, _ = batch
        logits = self(images).float()  # (N, K): softmax over 1000 classes loses too much in bfloat16
        losses = functional.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")  # (N,)
        return logits, losses


class ResidualClassifier(Classifier):
    """Residual networks: He et al. 2015 initialisation, and blocks that begin as the identity.

    He, Zhang, Ren & Sun 2015, "Delving deep into rectifiers", section 2.2, by outputs, as He
    et al. 2016 take it; the last norm of a block starts at zero as in Goyal et al. 2017, section 5.1.
    """

    def initialize(self) -> None:
        """Draw the kernels, zero the last scale of every block."""
        for layer in self.net.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            last = (
                layer.conv2 if isinstance(layer, BasicBlock) else layer.conv3 if isinstance(layer, Bottleneck) else None
            )
            if last is not None:
                norm = last[-1]
                assert isinstance(norm, nn.BatchNorm2d)
                nn.init.zeros_(norm.weight)
