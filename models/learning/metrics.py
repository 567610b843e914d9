"""Training metrics, means over all images and ranks since the last reading, and metrics of an evaluation by class."""

from typing import NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

UNSUMMED_STEPS = 64
ADDEND_UNIT = 2.0**-24


class TrainingMetrics(NamedTuple):
    """Means over images; top5 is None with five classes or fewer."""

    loss: float
    top1: float
    top5: float | None


def exact_addends(values: Tensor) -> Tensor:
    """Round losses or hits to multiples of 2**-24: float64 sums of those, up to 2**29, are the same in any order.

    A training that was stopped, or has more ranks, adds in another order. Shapes: (...) -> float64 (...).
    """
    return (values.double() / ADDEND_UNIT).round() * ADDEND_UNIT


class TrainingMetricAccumulator:
    """Sums the losses and hits of this rank's training images; reduces them over ranks when they are read."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k
        self._sums: Tensor | None = None  # images, loss, top-1, top-k hits; no buffer: DDP overwrites those
        self._unsummed: list[tuple[Tensor, Tensor]] = []  # losses (N,) and hits (N, top_k) of the latest steps

    @torch.no_grad()
    def add(self, losses: Tensor, logits: Tensor, *, labels: Tensor) -> None:
        """Count a batch. Shapes: (N,), (N, K), int64 (N,) or probabilities (N, K).

        In a mixed image each of its labels is a hit with its probability.
        """
        best = logits.topk(self.top_k).indices  # (N, top_k)
        hits = best == labels[:, None] if labels.ndim == 1 else labels.gather(1, best)  # (N, top_k)
        # Summed once in many steps: on a small network the sums of every step would cost as much as a layer.
        self._unsummed.append((losses.detach(), hits))
        if len(self._unsummed) == UNSUMMED_STEPS:
            self._sum_up()

    def take(self, module: pl.LightningModule) -> TrainingMetrics:
        """Return the means over the ranks of `module` since the last call. Every rank must call it at the same step."""
        sums = self.global_sums(module)
        assert sums is not None, "no training step since the last call"
        images, loss, top1, topk = sums.tolist()
        self._sums = None
        return TrainingMetrics(loss / images, top1 / images, topk / images if self.top_k == 5 else None)

    def global_sums(self, module: pl.LightningModule) -> Tensor | None:
        """Return the sums over all ranks, for a checkpoint; None before the first step."""
        self._sum_up()
        if self._sums is None:
            return None
        # `reduce` works in place, so it gets a copy.
        total = module.trainer.strategy.reduce(self._sums.to(module.device, copy=True), reduce_op="sum")
        assert isinstance(total, Tensor)
        return total

    def restore(self, sums: Tensor | None, *, rank: int) -> None:
        """Continue from the global sums of a checkpoint, held by rank 0."""
        self._sums = sums if sums is None or rank == 0 else torch.zeros_like(sums)

    def _sum_up(self) -> None:
        if self._unsummed:
            losses, hits = (torch.cat(parts) for parts in zip(*self._unsummed, strict=True))
            losses, hits = exact_addends(losses), exact_addends(hits)
            count = losses.new_tensor(len(losses))
            sums = torch.stack([count, losses.sum(), hits[:, 0].sum(), hits.sum()])
            self._sums = sums if self._sums is None else self._sums.to(sums.device) + sums
            self._unsummed.clear()


class ClassMetrics(Metric):
    """Macro F1 and balanced accuracy, exact over any number of ranks.

    Both are functions of a confusion matrix's diagonal and margins, so only those are counted: 24 KB for 1,000 classes
    instead of 8 MB. torchmetrics' matrix needs `bincount`, which makes the host wait for a GPU. Means are over the
    classes that have images: scikit-learn's `balanced_accuracy_score`, and its `f1_score` with their `labels`.
    """

    counts: Tensor  # (3, K): images, predictions and hits of each class

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(3, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch. Shapes: (N, K), int64 (N,)."""
        num_classes, predicted = self.counts.shape[1], logits.argmax(1)
        places = torch.cat([labels, predicted + num_classes, labels + 2 * num_classes])
        amounts = torch.ones(2, len(labels), dtype=torch.int64, device=labels.device)
        self.counts.view(-1).index_add_(0, places, torch.cat([amounts.view(-1), (predicted == labels).long()]))

    def compute(self) -> dict[str, Tensor]:
        """Return both metrics by name, float64 scalars; NaN without images."""
        images, predictions, hits = self.counts.double()
        has_images = images > 0
        f1, recall = 2 * hits / (images + predictions), hits / images
        return {"f1_macro": f1[has_images].mean(), "balanced_accuracy": recall[has_images].mean()}


class EvaluationMetrics(nn.Module):
    """The metrics of `evaluation.METRICS` by name, over the images of an evaluation on all ranks."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        # Its check for NaN would wait for the GPU at every batch; a mean with a NaN is NaN.
        self.loss = MeanMetric(nan_strategy="disable").set_dtype(torch.float64)
        self.top1 = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        has_top5 = num_classes > 5
        self.top5 = MulticlassAccuracy(num_classes, average="micro", top_k=5, validate_args=False) if has_top5 else None
        self.classes = ClassMetrics(num_classes)

    def update(self, logits: Tensor, losses: Tensor, *, labels: Tensor) -> None:
        """Count a batch. Shapes: (N, K), (N,), int64 (N,)."""
        self.loss.update(exact_addends(losses))
        for metric in self._counted:
            metric.update(logits, labels)

    def take(self) -> dict[str, Tensor]:
        """Return the metrics since the last call, float32 scalars."""
        values = {"loss": self.loss.compute(), "top1": self.top1.compute()}
        values |= {} if self.top5 is None else {"top5": self.top5.compute()}
        values |= self.classes.compute()
        for metric in (self.loss, *self._counted):
            metric.reset()
        return {name: value.to(torch.float32) for name, value in values.items()}

    @property
    def _counted(self) -> list[Metric]:
        return [self.top1, self.classes, *([] if self.top5 is None else [self.top5])]
