"""What verbs print: facts by name, and what was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console

from data.tars import LeftOut

NAMED = 10  # of the samples left out, so many are named


def print_facts(console: Console, facts: Mapping[str, str]) -> None:
    """Name and value, a line each."""
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        console.print(f"[bold]{name:<{width}}[/bold]  {value}", highlight=False, soft_wrap=True)


def report_left_out(console: Console, left_out: Sequence[LeftOut]) -> None:
    """Name the first samples that are not in the data set, and how many there are."""
    for sample in left_out[:NAMED]:
        console.print(f"left out: {sample.name}: {sample.reason}", highlight=False, soft_wrap=True)
    if left_out:
        console.print(f"{len(left_out):,} left out in all")
