"""How far probabilities can be trusted: calibration, a temperature, a threshold below which to abstain."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from scipy.stats import binomtest

from pipeline.evaluate.metrics import Answers, Floats

BINS = 15  # as Guo et al. 2017
TEMPERATURES = (0.05, 20.0)


class Reliability(NamedTuple):
    """Images by confidence in equal bins: (B,) each; NaN where a bin is empty."""

    edges: Floats  # (B + 1,)
    images: NDArray[np.int64]
    confidence: Floats
    accuracy: Floats

    @property
    def error(self) -> float:
        """Expected calibration error: the mean gap between confidence and accuracy, weighted by images."""
        gaps = np.abs(self.confidence - self.accuracy)
        return float(np.nansum(gaps * self.images) / self.images.sum())


def reliability(answers: Answers, *, bins: int = BINS) -> Reliability:
    """Compute confidence and accuracy in equal bins of confidence (Guo et al. 2017, equation 2)."""
    edges = np.linspace(0, 1, bins + 1)
    confidence, is_right = answers.probabilities.max(1), answers.is_among_top(1)
    number = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)  # (low, high]
    images = np.bincount(number, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(number, weights=one, minlength=bins) / images for one in (confidence, is_right)]
    return Reliability(edges, images, *means)


def fit_temperature(answers: Answers) -> float:
    """Return the temperature that minimises the cross-entropy (Guo et al. 2017, section 4.2).

    It is 1 without a mistake, where a lower one would always be better.
    """
    if answers.is_among_top(1).all():
        return 1.0

    def loss(log_temperature: float) -> float:
        scaled = log_softmax(answers.log_probabilities / np.exp(log_temperature), axis=1)
        return float(-scaled[np.arange(len(answers.labels)), answers.labels].mean())

    return float(np.exp(minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded").x))


def with_temperature(answers: Answers, temperature: float) -> Answers:
    """Return the answers with their logits divided by a temperature."""
    return Answers(log_softmax(answers.log_probabilities / temperature, axis=1), answers.labels)


def abstention_threshold(answers: Answers, precision: float) -> float | None:
    """Return the confidence from which on the share of right answers is at least `precision`, None if there is none.

    It lies midway between two images, so that rounding moves none across it.
    """
    confidence, is_right = answers.probabilities.max(1), answers.is_among_top(1)
    order = np.argsort(-confidence, kind="stable")
    shares = np.cumsum(is_right[order]) / np.arange(1, len(order) + 1)
    last_of_ties = np.append(np.diff(confidence[order]) != 0, True)
    enough = np.flatnonzero((shares >= precision) & last_of_ties)
    if not len(enough):
        return None
    last, least = int(enough[-1]), 1 / answers.log_probabilities.shape[1]  # no confidence is lower
    return float(np.append(confidence[order], least)[last : last + 2].mean())


def mcnemar(first: Answers, second: Answers) -> tuple[int, int, float]:
    """Compare two models on the same images: right in the first alone, in the second alone, and the exact p-value.

    McNemar 1947, as a two-sided binomial test of the images on which they differ.
    """
    one, other = first.is_among_top(1), second.is_among_top(1)
    only_first, only_second = int((one & ~other).sum()), int((other & ~one).sum())
    return only_first, only_second, mcnemar_p(only_first, only_second)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Return the exact p-value of two models that alone are right on this many images."""
    differing = only_first + only_second
    return float(binomtest(only_first, differing).pvalue) if differing else 1.0
