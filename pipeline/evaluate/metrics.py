"""Metrics of a classifier from its probabilities, as scikit-learn computes them, with bootstrap intervals."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, confusion_matrix, precision_recall_fscore_support, roc_auc_score

RESAMPLES, CONFIDENCE = 1000, 0.95
TOP = 5  # classes of the second accuracy, where there are more

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """Log-probabilities (N, K) of the images of a split, and their labels (N,)."""

    log_probabilities: Floats
    labels: NDArray[np.int64]

    @property
    def probabilities(self) -> Floats:
        """(N, K)."""
        return np.exp(self.log_probabilities)

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The most probable class of each image (N,)."""
        predicted: NDArray[np.int64] = self.log_probabilities.argmax(1)
        return predicted

    @property
    def losses(self) -> Floats:
        """The cross-entropy of each image (N,)."""
        return -self.log_probabilities[np.arange(len(self.labels)), self.labels]

    def is_among_top(self, count: int) -> NDArray[np.bool_]:
        """Whether the right class is among the `count` most probable ones (N,); of equal ones the first comes first."""
        labels = self.labels[:, None]
        right = np.take_along_axis(self.log_probabilities, labels, axis=1)
        is_before = np.arange(self.log_probabilities.shape[1]) < labels
        ahead = (self.log_probabilities > right) | ((self.log_probabilities == right) & is_before)
        is_among: NDArray[np.bool_] = ahead.sum(1) < count
        return is_among


class ClassMetrics(NamedTuple):
    """Metrics of each class against all others (K,); NaN where a class has no image."""

    images: NDArray[np.int64]
    precision: Floats
    recall: Floats
    f1: Floats
    specificity: Floats
    roc_auc: Floats
    average_precision: Floats


def class_metrics(answers: Answers) -> ClassMetrics:
    """Compute the metrics of each class."""
    num_classes = answers.log_probabilities.shape[1]
    every, probabilities = list(range(num_classes)), answers.probabilities
    precision, recall, f1, images = precision_recall_fscore_support(
        answers.labels, answers.predicted, labels=every, zero_division=np.nan
    )
    precision, f1 = (np.where(images > 0, one, np.nan) for one in (precision, f1))
    confusion = confusion_matrix(answers.labels, answers.predicted, labels=every)
    others = len(answers.labels) - confusion.sum(1)
    false_positives = confusion.sum(0) - np.diag(confusion)
    with np.errstate(divide="ignore", invalid="ignore"):
        specificity = np.where(others > 0, 1 - false_positives / others, np.nan)
    auc, average_precision = np.full(num_classes, np.nan), np.full(num_classes, np.nan)
    for label in every:
        is_class = answers.labels == label
        if is_class.any() and not is_class.all():
            auc[label] = roc_auc_score(is_class, probabilities[:, label])
            average_precision[label] = average_precision_score(is_class, probabilities[:, label])
    return ClassMetrics(images, precision, recall, f1, specificity, auc, average_precision)


def summarise(answers: Answers, classes: ClassMetrics) -> dict[str, float]:
    """Return the metrics of the entire split by name; macro averages are over the classes that have images."""
    present = classes.images > 0
    summary = {
        "top1": float(answers.is_among_top(1).mean()),
        "loss": float(answers.losses.mean()),
        "balanced_accuracy": float(classes.recall[present].mean()),
    }
    if answers.log_probabilities.shape[1] > TOP:
        summary["top5"] = float(answers.is_among_top(TOP).mean())
    weights = classes.images[present]
    for name in ("precision", "recall", "f1", "roc_auc", "average_precision"):
        values = getattr(classes, name)[present]
        if name == "precision":
            values = np.nan_to_num(values)  # of a class that is never predicted
        summary[f"{name}_macro"] = float(values.mean())
        summary[f"{name}_weighted"] = float(np.average(values, weights=weights))
    return summary


def bootstrap_intervals(
    answers: Answers, *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, tuple[float, float]]:
    """Return percentile intervals of the headline metrics over resampled images (Efron 1979).

    Intervals cover CONFIDENCE: top1, top5, loss, balanced accuracy and macro F1. An accuracy of 0 or 1, where resamples
    cannot differ, has the exact interval of Clopper & Pearson 1934 instead.
    """
    generator, count = np.random.default_rng(seed), len(answers.labels)
    num_classes = answers.log_probabilities.shape[1]
    per_image = {"top1": answers.is_among_top(1).astype(float), "loss": answers.losses}
    if num_classes > TOP:
        per_image["top5"] = answers.is_among_top(TOP).astype(float)
    all_predicted = answers.predicted
    drawn: dict[str, list[float]] = {name: [] for name in (*per_image, "balanced_accuracy", "f1_macro")}
    for _ in range(resamples):
        chosen = generator.integers(count, size=count)
        for name, values in per_image.items():
            drawn[name].append(float(values[chosen].mean()))
        labels, predicted = answers.labels[chosen], all_predicted[chosen]
        hits = np.bincount(labels[labels == predicted], minlength=num_classes)
        images, answered = (np.bincount(one, minlength=num_classes) for one in (labels, predicted))
        present = images > 0
        drawn["balanced_accuracy"].append(float((hits[present] / images[present]).mean()))
        drawn["f1_macro"].append(float((2 * hits[present] / (images + answered)[present]).mean()))
    tail = (1 - CONFIDENCE) / 2
    intervals = {name: tuple(np.quantile(values, [tail, 1 - tail]).tolist()) for name, values in drawn.items()}
    for name in {"top1", "top5"} & per_image.keys():
        num_right = int(per_image[name].sum())
        if num_right in (0, count):
            low, high = binomtest(num_right, count).proportion_ci(CONFIDENCE, "exact")
            intervals[name] = (float(low), float(high))
    return intervals


def worst_confusions(answers: Answers, count: int) -> list[tuple[int, int, int]]:
    """Return the most frequent mistakes: the right class, the answer, and how often."""
    wrong = answers.labels != answers.predicted
    pairs = np.stack([answers.labels[wrong], answers.predicted[wrong]], axis=1)
    found, times = np.unique(pairs, axis=0, return_counts=True)
    order = np.argsort(-times, kind="stable")[:count]
    return [(int(found[one, 0]), int(found[one, 1]), int(times[one])) for one in order]
