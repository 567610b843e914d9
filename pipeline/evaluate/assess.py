"""The statistics of an evaluation, from a model's answers alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.evaluate.calibration import (
    Reliability,
    abstention_threshold,
    fit_temperature,
    mcnemar,
    reliability,
    with_temperature,
)
from pipeline.evaluate.metrics import Answers, ClassMetrics, bootstrap_intervals, class_metrics, summarise
from pipeline.runs.calibration import Calibration


class Abstention(NamedTuple):
    """Coverage and accuracy of the answers above the threshold."""

    coverage: float  # share of the images that are answered
    accuracy: float  # of those, NaN for none


class Comparison(NamedTuple):
    """Two models on the same images (McNemar 1947)."""

    name: str
    top1: float
    right_here_alone: int
    right_there_alone: int
    p_value: float
    answers: Answers


@dataclass(frozen=True)
class Evaluation:
    """A model's answers to a split, and the statistics of them.

    `answers` have temperature 1, `calibrated` the temperature of `calibration`, which was fitted on the split
    `fitted_on`. `sizes` maps the image sizes that were tried to their accuracy on that split.
    """

    answers: Answers
    calibrated: Answers
    classes: Sequence[str]
    class_metrics: ClassMetrics
    summary: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    calibration: Calibration
    fitted_on: str
    reliability: Reliability
    calibrated_reliability: Reliability
    abstention: Abstention | None
    sizes: Mapping[str, float]
    versus: Comparison | None = None

    @property
    def is_unsure(self) -> list[bool]:
        """Whether each answer is below the threshold."""
        return [self.calibration.is_unsure(one) for one in self.calibrated.probabilities.max(1).tolist()]


def fit_calibration(answers: Answers, *, precision: float) -> Calibration:
    """Fit a temperature, then the threshold from which on answers have this precision."""
    temperature = fit_temperature(answers)
    threshold = abstention_threshold(with_temperature(answers, temperature), precision)
    return Calibration(temperature, threshold, precision)


def assess(
    answers: Answers,
    *,
    classes: Sequence[str],
    calibration: Calibration,
    fitted_on: str,
    sizes: Mapping[str, float],
    seed: int = 0,
) -> Evaluation:
    """Compute everything that a page shows."""
    of_classes, calibrated = class_metrics(answers), with_temperature(answers, calibration.temperature)
    return Evaluation(
        answers,
        calibrated,
        classes,
        of_classes,
        summarise(answers, of_classes),
        bootstrap_intervals(answers, seed=seed),
        calibration,
        fitted_on,
        reliability(answers),
        reliability(calibrated),
        abstain(calibrated, calibration),
        sizes,
    )


def abstain(calibrated: Answers, calibration: Calibration) -> Abstention | None:
    """Return coverage and accuracy at the threshold, None without one."""
    if calibration.threshold is None:
        return None
    answered = calibrated.probabilities.max(1) >= calibration.threshold
    right = calibrated.is_among_top(1)[answered]
    return Abstention(float(answered.mean()), float(right.mean()) if len(right) else float("nan"))


def compare(here: Answers, there: Answers, *, name: str) -> Comparison:
    """Compare two models on the same images."""
    here_alone, there_alone, p_value = mcnemar(here, there)
    return Comparison(name, float(there.is_among_top(1).mean()), here_alone, there_alone, p_value, there)


def confident_mistakes(evaluation: Evaluation, count: int) -> list[int]:
    """Return the wrong answers with the highest probability, as rows of the split's index."""
    probabilities, wrong = evaluation.calibrated.probabilities.max(1), ~evaluation.answers.is_among_top(1)
    order = np.argsort(-np.where(wrong, probabilities, -1.0), kind="stable")[:count]
    return [int(one) for one in order if wrong[one]]


def differing(evaluation: Evaluation, count: int) -> list[int]:
    """Return images that one model alone gets right, by turns for either, as rows of the split's index."""
    if evaluation.versus is None:
        return []
    here, there = evaluation.answers.is_among_top(1), evaluation.versus.answers.is_among_top(1)
    alone = [np.flatnonzero(here & ~there).tolist(), np.flatnonzero(~here & there).tolist()]
    each = max(count // 2, count - min(map(len, alone)))
    return [one for rows in alone for one in rows[:each]][:count]
