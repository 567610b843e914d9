"""Metrics and intervals against scikit-learn and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as reference
from statsmodels.stats.proportion import proportion_confint

from pipeline.evaluate.metrics import Answers, bootstrap_intervals, class_metrics, summarise, worst_confusions
from tests.support.answers import answers_of


@pytest.mark.parametrize(("count", "num_classes"), [(400, 10), (200, 2), (3000, 100)])
def test_metrics_are_scikit_learns(count: int, num_classes: int) -> None:
    answers = answers_of(count, num_classes)
    labels, predicted, probabilities = answers.labels, answers.predicted, answers.probabilities
    classes = class_metrics(answers)
    summary = summarise(answers, classes)
    every = range(num_classes)
    one_hot = labels[:, None] == np.arange(num_classes)
    expected = {
        "top1": reference.accuracy_score(labels, predicted),
        "loss": reference.log_loss(labels, probabilities, labels=list(every)),
        "balanced_accuracy": reference.balanced_accuracy_score(labels, predicted),
        **(
            {"top5": reference.top_k_accuracy_score(labels, probabilities, k=5, labels=list(every))}
            if num_classes > 5
            else {}
        ),
    }
    for average in ("macro", "weighted"):
        precision, recall, f1, _ = reference.precision_recall_fscore_support(
            labels, predicted, average=average, zero_division=0
        )
        expected |= {f"precision_{average}": precision, f"recall_{average}": recall, f"f1_{average}": f1}
        expected[f"roc_auc_{average}"] = reference.roc_auc_score(one_hot, probabilities, average=average)
        expected[f"average_precision_{average}"] = reference.average_precision_score(
            one_hot, probabilities, average=average
        )
    assert summary == pytest.approx(expected, abs=1e-9)
    for label in every:
        true_negatives, false_positives = reference.confusion_matrix(labels == label, predicted == label)[0]
        assert classes.specificity[label] == pytest.approx(
            true_negatives / (true_negatives + false_positives), abs=1e-12
        )


def test_a_class_without_images_has_no_metrics_and_changes_no_average() -> None:
    answers = answers_of(300, 5)
    wider = Answers(np.pad(answers.log_probabilities, ((0, 0), (0, 2)), constant_values=-60.0), answers.labels)
    classes = class_metrics(wider)
    assert np.isnan(classes.recall[5:]).all()
    assert np.isnan(classes.roc_auc[5:]).all()
    narrow = summarise(answers, class_metrics(answers))
    assert {name: value for name, value in summarise(wider, classes).items() if name != "top5"} == pytest.approx(narrow)


def test_intervals_are_scipys() -> None:
    answers = answers_of(500, 10)
    found = bootstrap_intervals(answers, resamples=400)
    for name, values in (("top1", answers.is_among_top(1)), ("loss", answers.losses)):
        result = stats.bootstrap(
            (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
        )
        expected = result.confidence_interval
        width = expected.high - expected.low
        assert found[name] == pytest.approx((expected.low, expected.high), abs=0.1 * width)
    summary = summarise(answers, class_metrics(answers))
    assert all(low < summary[name] < high for name, (low, high) in found.items())
    assert bootstrap_intervals(answers, resamples=50) == bootstrap_intervals(answers, resamples=50)


def test_an_accuracy_without_a_mistake_has_the_exact_interval() -> None:
    answers = answers_of(9, 3)
    right = Answers(answers.log_probabilities, answers.predicted)
    expected = proportion_confint(9, 9, alpha=0.05, method="beta")
    assert bootstrap_intervals(right, resamples=5)["top1"] == pytest.approx(expected, rel=1e-9)


def test_the_most_frequent_mistakes_come_first() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    predicted = np.array([1, 1, 0, 0, 1, 0])
    answers = Answers(np.log(np.eye(3)[predicted] * 0.7 + 0.1), labels)
    assert worst_confusions(answers, 2) == [(0, 1, 2), (1, 0, 1)]


def test_equal_probabilities_are_right_once() -> None:
    answers = Answers(np.log(np.full((4, 4), 0.25)), np.arange(4))
    assert answers.is_among_top(1).tolist() == (answers.predicted == answers.labels).tolist() == [True] + [False] * 3
    assert answers.is_among_top(2).tolist() == [True, True, False, False]


def test_a_metric_that_is_undefined_is_no_number() -> None:
    answers = Answers(np.log(np.array([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1]])), np.array([0, 0]))
    found = class_metrics(answers)
    for values in (found.precision[1:], found.f1[1:]):
        assert np.isnan(values).all(), "classes without images"
    assert np.isnan(summarise(answers, found)["roc_auc_macro"])
