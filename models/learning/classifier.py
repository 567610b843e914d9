"""The base Lightning module: one training and evaluation step for every network."""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, Self, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from models.arguments import require
from models.layers import batch_norms, set_batch_norm, undecayed_parameters, zero_last_norms
from models.learning.averaging import AveragedWeights
from models.learning.evaluation import AVERAGED, RAW
from models.learning.losses import Loss, cross_entropy
from models.learning.metrics import EvaluationMetrics, TrainingMetricAccumulator
from models.learning.recipe import OptimizerFactory, Recipe, computes_gradients
from models.parts import RateGroup, frozen_parts, groups_by_part

Forward = Callable[[Tensor], Tensor]  # images (N, C, H, W) -> logits (N, K)


def fused_on(device: torch.device, factory: OptimizerFactory) -> OptimizerFactory:
    """Return an optimizer that updates all weights in one kernel where it has one for a GPU.

    torch's RMSprop has none. Those for a CPU are left alone: torch 2.14.1 reads gradients in the order of their memory,
    so one that has another memory format than its weights updates the wrong ones. A choice of `fused` or `foreach` in
    the config stays.
    """
    given = factory.keywords if isinstance(factory, partial) else {}
    has_fused = "fused" in inspect.signature(factory).parameters
    if device.type != "cuda" or not has_fused or {"fused", "foreach"} & given.keys():
        return factory
    return cast(OptimizerFactory, partial(cast(Any, factory), fused=True))


class Classifier(pl.LightningModule):
    """A network with the loss, optimizer and schedule of a recipe, and the metrics of `evaluation.METRICS`.

    Residual blocks start as the identity, with a last norm of zero (Goyal et al. 2017, section 5.1).
    """

    is_depthwise: ClassVar[bool] = False  # most of the time goes into depthwise convolutions

    def __init__(self, net: nn.Module, *, num_classes: int, recipe: Recipe) -> None:
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)
        self.recipe = recipe
        self.num_classes, self.top_k = num_classes, 5 if num_classes > 5 else 1
        self.initialize()
        zero_last_norms(self.net)
        self._frozen = frozen_parts(self.net, recipe.freeze or ())
        for part in self._frozen:
            part.requires_grad_(False).eval()
        self.training_metrics = TrainingMetricAccumulator(self.top_k)
        self.images_per_step: int | None = None  # of all ranks, which scales the learning rate
        self.average: AveragedWeights | None = None  # where a training averages its weights
        self.batch_key: int | None = None  # 64 bits, of the random numbers of the next training batch
        self.evaluated_images = 0  # on all ranks, in the last evaluation
        self._num_evaluated = 0  # on this rank, so far
        self.metrics, self.average_metrics = EvaluationMetrics(num_classes), EvaluationMetrics(num_classes)

    def initialize(self) -> None:
        """Set initial weights that differ from torch's; families override it."""

    def train(self, mode: bool = True) -> Self:
        """Set the mode, in which frozen parts stay as in an evaluation: no dropout, and batch norms keep averages."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Shapes: (N, C, H, W) -> (N, K)."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_index: int) -> Tensor:
        """Return the mean loss of a batch: images (N, C, H, W), labels (N,), samples (N,)."""
        batch = self._mix(batch)
        logits, losses = self._step(batch, self.recipe.loss)
        self.training_metrics.add(losses, logits, labels=batch[1])
        return losses.mean()

    def on_fit_start(self) -> None:
        """Let the averages follow the network to its device."""
        if self.average is not None:
            self.average.follow()

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401  # whatever Lightning passes
        """Take a step, then average the weights, before anything can save them."""
        super().optimizer_step(*arguments, **options)
        if self.average is not None:
            self.average.update(self.trainer.global_step + 1)

    def on_validation_start(self) -> None:
        """Begin to count, and give every rank the batch-norm statistics of rank 0, which the checkpoint holds."""
        self._num_evaluated = 0
        if self.trainer.world_size > 1:
            averages = [] if self.average is None else self.average.buffers
            for buffer in (*self.net.buffers(), *averages):
                torch.distributed.broadcast(buffer, src=0)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_index: int) -> None:
        """Count the hits and losses of a batch, with the weights and with their average.

        The loss is plain cross-entropy, so that recipes compare.
        """
        self._num_evaluated += len(batch[1])
        for _, forward, metrics in self._evaluated():
            logits, losses = self._step(batch, cross_entropy, forward=forward)
            metrics.update(logits, losses, labels=batch[1])

    def on_validation_epoch_end(self) -> None:
        """Log the metrics over all ranks."""
        images = torch.tensor(self._num_evaluated, device=self.device)
        self.evaluated_images = int(self.trainer.strategy.reduce(images, reduce_op="sum"))
        for weights, _, metrics in self._evaluated():
            for name, value in metrics.take().items():
                self.log(f"{weights}/{name}", value)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the network's settings that are in no tensor, the averages, and the training sums of all ranks."""
        norms = batch_norms(self.net)
        checkpoint["norm_eps"] = norms[0].eps if norms else None  # publishers' differ
        checkpoint["image_size"] = getattr(self.net, "image_size", None)  # decides the strides
        checkpoint["train_sums"] = self.training_metrics.global_sums(self)
        if self.average is not None:
            checkpoint[self.average.key] = self.average.tensors

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the norms' constant, the averages and the training sums."""
        set_batch_norm(self.net, eps=checkpoint.get("norm_eps"))
        self.training_metrics.restore(checkpoint.get("train_sums"), rank=self.global_rank)
        if self.average is not None:
            self.average.load(checkpoint[self.average.key])

    def weight_decay_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the kernels and matrices that decay (He et al. 2019, section 3.1, and `no_decay`), and the others.

        Frozen ones are in neither.
        """
        undecayed = undecayed_parameters(self.net)
        trained = [one for one in self.parameters() if one.requires_grad]
        decayed = [one for one in trained if one.ndim > 1 and one not in undecayed]
        others = set(trained).difference(decayed)
        return decayed, [one for one in trained if one in others]

    def rate_groups(self) -> list[RateGroup]:
        """Return the trained parameters in groups: by weight decay, and in fine-tuning by part of the network."""
        (decayed, free), recipe = self.weight_decay_groups(), self.recipe
        if recipe.layer_decay is None and not recipe.head_warmup:
            return [RateGroup(decayed, decays=True), RateGroup(free, decays=False)]
        return groups_by_part(self.net, decayed, layer_decay=recipe.layer_decay or 1.0)

    def _clips_mixed(self, precision: str) -> bool:
        return self.recipe.clip_norm is not None and precision.endswith("mixed")

    def optimizer_factory(self, precision: str) -> OptimizerFactory:
        """Return the recipe's optimizer, fused where the device and the precision allow it."""
        factory = self.recipe.optimizer_factory(self.images_per_step)
        return factory if self._clips_mixed(precision) else fused_on(self.device, factory)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the recipe's optimizer over the groups, and their schedules by optimizer step."""
        groups = self.rate_groups()
        optimizer = self.optimizer_factory(str(self.trainer.precision))([group.options for group in groups])
        for group, options in zip(groups, optimizer.param_groups, strict=True):
            options["lr"] *= group.scale
        # In mixed precision Lightning refuses to clip gradients for every optimizer that could unscale them itself.
        if self._clips_mixed(str(self.trainer.precision)):
            fits = not getattr(optimizer, "_step_supports_amp_scaling", False)
            require(fits, "does not go with a fused optimizer in mixed precision", clip_norm=self.recipe.clip_norm)
        if computes_gradients(optimizer):
            rule = f"does not go with {type(optimizer).__name__}: use bf16-mixed or 32-true"
            require(self.trainer.precision != "16-mixed", rule, precision=self.trainer.precision)
        num_steps = int(self.trainer.estimated_stepping_batches)
        lengths = {"steps_per_epoch": num_steps // self.recipe.epochs, "num_steps": num_steps}
        factors = [self.recipe.body_lr_factor if group.waits else self.recipe.lr_factor for group in groups]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [partial(factor, **lengths) for factor in factors])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _mix(self, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Mix images and labels as the recipe says; the labels of a mixed batch are probabilities, (N, K)."""
        mixing = self.recipe.mix
        if mixing is None or self.current_epoch >= mixing.count_epochs(self.recipe.epochs):
            return batch
        assert self.batch_key is not None, "a callback gives every batch its key"
        images, labels, samples = batch
        return *mixing.mix_batch(images, labels, num_classes=self.num_classes, key=self.batch_key), samples

    def _evaluated(self) -> Iterator[tuple[str, Forward, EvaluationMetrics]]:
        """Yield the network with its weights and with their average: the beginning of keys, a function, its metrics."""
        yield RAW, self, self.metrics
        if self.average is not None:
            yield AVERAGED, self.average, self.average_metrics

    def _step(
        self, batch: tuple[Tensor, Tensor, Tensor], loss: Loss, *, forward: Forward | None = None
    ) -> tuple[Tensor, Tensor]:
        images, labels, _ = batch
        logits = (forward or self)(images).float()  # (N, K): softmax over 1000 classes loses too much in bfloat16
        return logits, loss(logits, labels)  # (N, K), (N,)
