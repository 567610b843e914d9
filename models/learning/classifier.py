"""The Lightning modules: how a network learns to classify, apart from what the network is.

`Classifier` holds the one training and evaluation step; a subclass a family states
what that family's papers do differently.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from models.attention import TABLE, RelativeBias
from models.layers import batch_norms, set_batch_norm
from models.learning.recipe import Recipe
from models.residual import BasicBlock, Bottleneck

UNSUMMED_STEPS = 64


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

    default_recipe: ClassVar[str] = "sgd"  # of conf/recipe/; a network's own config may refine it

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
        """Keep what the tensors do not say of the network, and the sums of all ranks that the next point needs."""
        norms = batch_norms(self.net)
        checkpoint["norm_eps"] = norms[0].eps if norms else None  # publishers' differ
        checkpoint["image_size"] = getattr(self.net, "image_size", None)  # on which strides hang
        self._sum_up()
        checkpoint["train_sums"] = None if self._train_sums is None else self._over_ranks(self._train_sums)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the norms' constant, and with the sums of all ranks on the first of them."""
        set_batch_norm(self.net, eps=checkpoint.get("norm_eps"))
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


class SequentialClassifier(Classifier):
    """Sequential networks: kernels drawn for ReLU, a small last layer, no biases.

    Simonyan & Zisserman 2015, section 3.1, began their deep stacks from shallow ones, for random weights of
    standard deviation 0.1 stalled them; He, Zhang, Ren & Sun 2015 removed the need with sqrt(2 / fan-in).
    The last layer keeps the 0.01 of Krizhevsky et al. 2012, section 5, whose decay the recipe has; their
    biases of 1, to feed ReLU early, are then not needed.
    """

    default_recipe = "sgd_step"

    def initialize(self) -> None:
        """Draw kernels and matrices, zero the biases."""
        layers = [layer for layer in self.net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        nn.init.normal_(layers[-1].weight, std=0.01)


class ResidualClassifier(Classifier):
    """Residual networks: He et al. 2015 initialisation, and blocks that begin as the identity.

    He, Zhang, Ren & Sun 2015, "Delving deep into rectifiers", as He et al. 2016, section 3.4, ask for; by
    outputs, as torchvision takes it. The last norm of a block starts at zero: Goyal et al. 2017, section 5.1.
    """

    def initialize(self) -> None:
        """Draw the kernels, zero the last scale of every block."""
        for layer in self.net.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(layer, BasicBlock | Bottleneck):
                norm = (layer.conv2 if isinstance(layer, BasicBlock) else layer.conv3)[-1]
                assert isinstance(norm, nn.BatchNorm2d)
                nn.init.zeros_(norm.weight)


class SeparableClassifier(Classifier):
    """Depthwise separable networks: kernels drawn by the outputs of a group, and depthwise ones do not decay.

    Howard et al. 2017, section 3.2, put little or no weight decay on depthwise filters, which have so
    few weights; the code of Tan & Le 2019 lets them, and biases, decay. From that code are the kernels,
    N(0, 2 / fan-out), where the fan-out of a depthwise one is K^2, not C K^2, and the matrices, U(-1, 1) / sqrt(K).
    """

    default_recipe = "rmsprop"

    def initialize(self) -> None:
        """Draw kernels and matrices, zero the biases."""
        for layer in self.net.modules():
            if isinstance(layer, nn.Conv2d):
                fan_out = layer.weight[0, 0].numel() * layer.out_channels // layer.groups
                nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_out))
            elif isinstance(layer, nn.Linear):
                nn.init.uniform_(layer.weight, -1 / math.sqrt(layer.out_features), 1 / math.sqrt(layer.out_features))
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies: to kernels and matrices, but not to depthwise ones."""
        return super().decays(name, parameter) and "depthwise" not in name.split(".")


class AttentionClassifier(Classifier):
    """Attention-augmented networks: everything begins as a narrow normal, and tables of offsets do not decay.

    Kernels and matrices have a standard deviation of 0.02 in the code of Liu et al. 2022 (their table 5 prints
    0.2), which also leaves all one-dimensional parameters without decay. Dai et al. 2021 state neither; relative
    biases are, like the other biases, left alone.
    """

    default_recipe = "adamw"

    def initialize(self) -> None:
        """Draw kernels, matrices and tables, zero the biases."""
        for layer in self.net.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)  # cut at 2, a hundred deviations, there too
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, RelativeBias):
                nn.init.trunc_normal_(layer.table, std=0.02)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies: to kernels and matrices, not to tables of relative attention."""
        return super().decays(name, parameter) and not name.endswith(TABLE)
