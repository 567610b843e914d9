"""The page of trained runs side by side, from the rows of their table."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.pages.charts import pareto_chart, series_style
from pipeline.pages.report_page import template


class Front(NamedTuple):
    """A cost with its title: its value for each run, None where it is unknown, and the names on the Pareto front."""

    title: str
    costs: Sequence[float | None]
    best: Sequence[str]


def render_runs(
    rows: Sequence[Mapping[str, Any]],
    neighbours: Sequence[Mapping[str, Any]],
    *,
    fronts: Mapping[str, Front],
    split: str | None,
) -> str:
    """Make the page of ranked runs. HTML without scripts and requests."""
    names, top1 = [row["name"] for row in rows], [row["top1"] for row in rows]
    charts = {
        front.title: pareto_chart(names, front.costs, top1=top1, x=front.title, best=front.best)
        for front in fronts.values()
    }
    series = [series_style(place, len(rows)) for place in range(len(rows))]
    page = template("runs.html")
    return page.render(rows=rows, neighbours=neighbours, charts=charts, series=series, split=split)
