"""Calibration, temperature, abstention and McNemar's test against torchmetrics, SciPy and statsmodels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax
from statsmodels.stats.contingency_tables import mcnemar
from torchmetrics.functional.classification import multiclass_calibration_error

from pipeline.evaluate import calibration
from pipeline.evaluate.metrics import Answers
from tests.support.answers import answers_of


@pytest.mark.parametrize("num_classes", [2, 10])
def test_the_calibration_error_is_torchmetrics(num_classes: int) -> None:
    answers = answers_of(800, num_classes, skill=3.0)
    expected = multiclass_calibration_error(
        torch.from_numpy(answers.probabilities), torch.from_numpy(answers.labels), num_classes, n_bins=15, norm="l1"
    )
    found = calibration.reliability(answers)
    assert found.error == pytest.approx(float(expected), abs=1e-6)
    assert found.images.sum() == 800


def test_the_temperature_minimises_the_loss_and_undoes_a_scale() -> None:
    answers = answers_of(2000, 10)
    sharp = Answers(log_softmax(answers.log_probabilities * 2.5, axis=1), answers.labels)
    assert calibration.fit_temperature(sharp) == pytest.approx(2.5 * calibration.fit_temperature(answers), rel=1e-4)
    temperature = calibration.fit_temperature(sharp)

    def loss(values: np.ndarray) -> float:
        return float(calibration.with_temperature(sharp, float(values[0])).losses.mean())

    assert temperature == pytest.approx(float(minimize(loss, [1.0], method="Nelder-Mead").x[0]), rel=1e-3)
    before, after = (
        calibration.reliability(one).error for one in (sharp, calibration.with_temperature(sharp, temperature))
    )
    assert after < before / 2


def test_without_a_mistake_there_is_no_temperature() -> None:
    answers = answers_of(50, 3)
    for sharpness in (1.0, 10.0):
        log_probabilities = log_softmax(answers.log_probabilities * sharpness, axis=1)
        assert calibration.fit_temperature(Answers(log_probabilities, answers.predicted)) == 1.0


def test_the_threshold_is_the_smallest_that_reaches_the_precision() -> None:
    answers = answers_of(1000, 5)
    threshold = calibration.abstention_threshold(answers, 0.9)
    assert threshold is not None
    confidence, is_right = answers.probabilities.max(1), answers.is_among_top(1)
    shares = {value: is_right[confidence >= value].mean() for value in confidence}
    smallest = min(value for value, share in shares.items() if share >= 0.9)
    next_lower = max(value for value in confidence if value < smallest)
    assert threshold == pytest.approx((smallest + next_lower) / 2, rel=1e-12)
    assert (
        calibration.abstention_threshold(Answers(answers.log_probabilities, (answers.predicted + 1) % 5), 0.9) is None
    )


def test_mcnemar_is_statsmodels() -> None:
    first = answers_of(500, 10, skill=2.0)
    second = Answers(answers_of(500, 10, seed=1, skill=2.2).log_probabilities, first.labels)
    one, other = first.is_among_top(1), second.is_among_top(1)
    table = [
        [int((one & other).sum()), int((one & ~other).sum())],
        [int((~one & other).sum()), int((~one & ~other).sum())],
    ]
    only_first, only_second, p_value = calibration.mcnemar(first, second)
    assert (only_first, only_second) == (table[0][1], table[1][0])
    assert p_value == pytest.approx(mcnemar(table, exact=True).pvalue, rel=1e-9)
    assert calibration.mcnemar(first, first) == (0, 0, 1.0)


def test_a_threshold_for_all_images_lies_below_all() -> None:
    answers = answers_of(200, 5)
    threshold = calibration.abstention_threshold(answers, 0.01)
    assert threshold is not None
    assert 0.2 < threshold < answers.probabilities.max(1).min()
