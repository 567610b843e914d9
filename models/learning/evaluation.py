"""The metrics of an evaluation by name. Imports no torch, for commands that only name them."""

from collections.abc import Iterator
from typing import NamedTuple


class EvaluationMetric(NamedTuple):
    """A metric that every evaluation logs as `key`; `aliases` are other names for it."""

    name: str
    is_higher_better: bool = True
    aliases: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Its key in the journal and on the dashboard."""
        return f"val/{self.name}"

    @property
    def mode(self) -> str:
        """The direction of better values, as Lightning names it."""
        return "max" if self.is_higher_better else "min"

    @property
    def names(self) -> Iterator[str]:
        """Everything that it may be called."""
        for name in (self.name, *self.aliases):
            yield from (name, f"val/{name}")


TOP1 = EvaluationMetric("top1", aliases=("accuracy",))
TOP5 = EvaluationMetric("top5")
METRICS = (
    TOP1,
    TOP5,
    EvaluationMetric("loss", is_higher_better=False),
    EvaluationMetric("f1_macro", aliases=("f1", "macro_f1")),
    EvaluationMetric("balanced_accuracy"),
)
METRICS_BY_NAME = {name: metric for metric in METRICS for name in metric.names}
