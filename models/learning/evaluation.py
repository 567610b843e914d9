"""The metrics of an evaluation by name. Imports no torch, for commands that only name them."""

from collections.abc import Iterator
from typing import NamedTuple

RAW, AVERAGED = "val", "val_ema"  # beginnings of keys: metrics of the weights, and of their moving average


class EvaluationMetric(NamedTuple):
    """A metric that an evaluation logs as `key`, of the raw or the averaged weights; `aliases` are other names."""

    name: str
    is_higher_better: bool = True
    aliases: tuple[str, ...] = ()
    weights: str = RAW

    @property
    def key(self) -> str:
        """Its key in the journal and on the dashboard."""
        return f"{self.weights}/{self.name}"

    @property
    def is_averaged(self) -> bool:
        """Whether it is that of the averaged weights."""
        return self.weights == AVERAGED

    @property
    def mode(self) -> str:
        """The direction of better values, as Lightning names it."""
        return "max" if self.is_higher_better else "min"

    @property
    def names(self) -> Iterator[str]:
        """Everything that it may be called."""
        for name in (self.name, *self.aliases):
            yield f"{self.weights}/{name}"
            if not self.is_averaged:
                yield name

    def of(self, weights: str) -> "EvaluationMetric":
        """Return the same metric of the raw or the averaged weights."""
        return self._replace(weights=weights)


TOP1 = EvaluationMetric("top1", aliases=("accuracy",))
TOP5 = EvaluationMetric("top5")
METRICS = (
    TOP1,
    TOP5,
    EvaluationMetric("loss", is_higher_better=False),
    EvaluationMetric("f1_macro", aliases=("f1", "macro_f1")),
    EvaluationMetric("balanced_accuracy"),
)
_AVERAGED_METRICS = tuple(metric.of(AVERAGED) for metric in METRICS)
METRICS_BY_NAME = {name: metric for metric in (*METRICS, *_AVERAGED_METRICS) for name in metric.names}


def top1_of(chosen_by: str | None) -> EvaluationMetric:
    """Return the top-1 of the weights that are kept when the metric with this key chooses them."""
    return TOP1 if chosen_by is None else TOP1.of(METRICS_BY_NAME[chosen_by].weights)
