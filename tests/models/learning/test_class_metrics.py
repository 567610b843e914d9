"""Macro F1 and balanced accuracy against scikit-learn, from batches of any size and any number of ranks."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score
from torch import Tensor

from models.learning.evaluation import METRICS, METRICS_BY_NAME
from models.learning.metrics import ClassMetrics
from tests.support.commands import COMPUTED


def make_answers(count: int, num_classes: int, *, without: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Return logits (N, K) that are often right, and labels (N,) of skewed classes, none of them in `without`."""
    generator = torch.Generator().manual_seed(count)
    shares = torch.arange(1, num_classes + 1).double() ** 2
    shares[list(without)] = 0
    labels = torch.multinomial(shares, count, replacement=True, generator=generator)
    logits = torch.randn(count, num_classes, generator=generator)
    logits[torch.arange(count), labels] += 1
    return logits, labels


def by_scikit_learn(logits: Tensor, labels: Tensor) -> dict[str, float]:
    predicted, right = logits.argmax(1).numpy(), labels.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # answers of classes without an image
        return {
            "f1_macro": f1_score(right, predicted, labels=np.unique(right), average="macro"),
            "balanced_accuracy": balanced_accuracy_score(right, predicted),
        }


def numbers(metrics: ClassMetrics) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.compute().items()}


@pytest.mark.parametrize(("num_classes", "without"), [(2, ()), (7, ()), (7, (6,)), (300, (0, 5, 299))])
def test_both_equal_scikit_learn(num_classes: int, without: tuple[int, ...]) -> None:
    logits, labels = make_answers(1003, num_classes, without=without)
    expected = by_scikit_learn(logits, labels)
    if not without and num_classes < 10:
        assert len(labels.unique()) == num_classes
        assert expected["f1_macro"] == f1_score(labels, logits.argmax(1), average="macro")
    assert abs(expected["f1_macro"] - expected["balanced_accuracy"]) > 1e-3
    metrics = ClassMetrics(num_classes)
    for part in torch.arange(1003).split(64):
        metrics.update(logits[part], labels[part])
    assert numbers(metrics) == pytest.approx(expected, rel=1e-12)


def test_a_mean_of_batches_or_ranks_would_be_another_number() -> None:
    logits, labels = make_answers(100, 7)
    expected, ranks = by_scikit_learn(logits, labels), [ClassMetrics(7), ClassMetrics(7)]
    for rank, metrics in enumerate(ranks):
        metrics.update(logits[rank::2], labels[rank::2])
    mean = sum(numbers(metrics)["f1_macro"] for metrics in ranks) / 2
    assert abs(mean - expected["f1_macro"]) > 1e-3
    ranks[0].reset()
    assert ranks[0].counts.sum() == 0
    ranks[0].update(logits[::2], labels[::2])
    ranks[0].counts += ranks[1].counts  # as the ranks' sum
    assert numbers(ranks[0]) == pytest.approx(expected, rel=1e-12)


def test_every_metric_is_compared_between_runs_and_has_its_own_names() -> None:
    assert {metric.key for metric in METRICS_BY_NAME.values()} <= {*COMPUTED}
    assert sum(len([*metric.names]) for metric in METRICS) == 16
    assert len(METRICS_BY_NAME) == 16 + 8, "those of averaged weights have a prefix"
    assert [metric.name for metric in METRICS if metric.mode == "min"] == ["loss"]
    assert METRICS_BY_NAME["f1"].key == METRICS_BY_NAME["val/macro_f1"].key == "val/f1_macro"
    assert METRICS_BY_NAME["val_ema/f1"].key == METRICS_BY_NAME["val_ema/macro_f1"].key == "val_ema/f1_macro"
    assert [METRICS_BY_NAME[name].is_averaged for name in ("top1", "val/top1", "val_ema/top1")] == [False, False, True]
