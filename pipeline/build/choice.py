"""From a config to the metric that chooses the best checkpoint, and to when a training stops early."""

import math
from typing import NamedTuple

from omegaconf import DictConfig

from models.arguments import require
from models.learning.evaluation import METRICS, METRICS_BY_NAME, TOP1, EvaluationMetric
from pipeline.cli.errors import nearest


class Choice(NamedTuple):
    """How a training chooses its best checkpoint, and whether it stops when that no longer improves.

    It stops after `patience` evaluations in a row without an improvement of more than `min_improvement`; None: never.
    """

    metric: EvaluationMetric = TOP1
    patience: int | None = None
    min_improvement: float = 0.0


def build_choice(config: DictConfig) -> Choice:
    """Build the choice of a training. Raises: ValueError for an unknown metric or an impossible number."""
    name, patience, improvement = str(config.choose_by), config.stop_early, config.min_improvement
    advice = f"is not one of {', '.join(metric.name for metric in METRICS)}{nearest(name, METRICS_BY_NAME)}"
    require(name in METRICS_BY_NAME, advice, choose_by=name)
    metric = METRICS_BY_NAME[name]
    rule = f"needs averaged weights: add averaging=ema, or take choose_by={metric.name}"
    require(bool(config.averaging) or not metric.is_averaged, rule, choose_by=name)
    is_count = isinstance(patience, int) and patience is not True and patience >= 1
    rule = "must be a number of evaluations of at least 1, as in stop_early=5, or null to train all epochs"
    require(patience is None or is_count, rule, stop_early=patience)
    is_number = isinstance(improvement, int | float) and not isinstance(improvement, bool)
    rule = "must be a number of at least 0, as in min_improvement=0.001"
    require(is_number and 0 <= improvement < math.inf, rule, min_improvement=improvement)
    rule = "needs early stopping: add stop_early=5"
    require(patience is not None or improvement == 0, rule, min_improvement=improvement)
    return Choice(metric, patience, float(improvement))
