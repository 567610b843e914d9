"""The page of an evaluation, from the numbers of its JSON file, charts and pictures."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.pages import wording
from pipeline.pages.charts import ConfidenceBins, accuracy_over_coverage, calibration_chart
from pipeline.pages.report_page import template

FREQUENT = 10  # mistakes that the page names
TABLE_CLASSES = 20  # of which the metrics are shown at once, the worst ones first
HEADLINES = {
    "top1": "top-1",
    "top5": "top-5",
    "loss": "loss",
    "balanced_accuracy": "balanced accuracy",
    "f1_macro": "F1, macro",
}


class Picture(NamedTuple):
    """An image of a split with its predictions; `uri` is empty for an image that cannot be shown."""

    uri: str
    name: str
    label: str
    answer: str
    probability: float
    other_answer: str = ""


class Confusion(NamedTuple):
    """Images of some classes (k,) by right class (rows) and answer (columns): (k, k), and of all classes."""

    classes: Sequence[str]
    images: NDArray[np.int64]
    num_classes: int


class Curves(NamedTuple):
    """The points of the charts, by equal bins of confidence and by share of answered images."""

    bins: ConfidenceBins
    bins_with_temperature: ConfidenceBins
    coverage: NDArray[np.float64]  # (C,)
    accuracy_of_answered: NDArray[np.float64]  # (C,)


def render_evaluation(
    numbers: Mapping[str, Any],
    *,
    confusion: Confusion,
    curves: Curves,
    mistakes: Sequence[Picture],
    differences: Sequence[Picture],
) -> str:
    """Make the page of one evaluation: HTML without scripts and requests."""
    calibration = numbers["calibration"]
    threshold = None if calibration["threshold"] is None else (calibration["answered"], calibration["top1_of_answered"])
    charts = {
        "reliability": calibration_chart(curves.bins, with_temperature=curves.bins_with_temperature),
        "coverage": accuracy_over_coverage(curves.coverage, curves.accuracy_of_answered, threshold=threshold),
    }
    page = template("evaluation.html")
    return page.render(
        numbers=numbers,
        headlines=[(HEADLINES[name], name) for name in HEADLINES if name in numbers["metrics"]],
        classes=sorted(numbers["classes"], key=_by_f1),
        first_classes=TABLE_CLASSES,
        frequent=FREQUENT,
        confusion=confusion,
        shades=_shades(confusion),
        charts=charts,
        mistakes=mistakes,
        differences=differences,
        p_value=_p_value,
    )


def _by_f1(row: Mapping[str, Any]) -> float:
    return 2.0 if row["f1"] is None else float(row["f1"])


def _shades(confusion: Confusion) -> list[list[float]]:
    """The share of each answer among the images of its row, 0 to 1."""
    rows = np.maximum(confusion.images.sum(1, keepdims=True), 1)
    shades: list[list[float]] = np.round(confusion.images / rows, 3).tolist()
    return shades


def _p_value(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"= {wording.significant(value, 2)}"
