"""The table of a comparison in a terminal."""

from collections.abc import Sequence

from rich.table import Table

from pipeline.comparison.runs import ComparedRun, Neighbours
from pipeline.pages.wording import hours, integer, rate, share


def build_table(runs: Sequence[ComparedRun], *, split: str | None) -> Table:
    """Return the table of ranked runs."""
    where = "of the best checkpoint" if split is None else f"on {split}"
    names = ("parameters, M", "multiply-adds, G", "receptive field, px", "images/s", "epochs", "hours")
    table = Table("run", f"top-1 {where}", "95 % interval", *names)
    for run in runs:
        table.add_row(
            run.name,
            "" if run.top1 is None else share(run.top1, digits=2),
            "" if run.interval is None else " to ".join(map(share, run.interval)),
            f"{run.parameters / 1e6:.2f}",
            f"{run.gmacs:.3f}",
            integer(run.receptive_field),
            "" if run.images_per_second is None else rate(run.images_per_second),
            str(run.epochs),
            hours(run.hours),
        )
    return table


def describe_difference(pair: Neighbours) -> str:
    """Return a line about two runs: images on which only one is right, and the p-value of McNemar's exact test."""
    better, worse = pair.right_better_alone, pair.right_worse_alone
    only = f"{pair.better} alone is right on {better} images, {pair.worse} alone on {worse}"
    return f"{only} (McNemar's exact test, p = {pair.mcnemar_p:.2g})"
