"""What verbs print: facts by name, what was left out; and which of several processes prints."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape

from data.shards.tars import LeftOut

FILE_WIDTH = 160  # columns of a table that no terminal cuts
NAMED = 10  # of the samples left out, so many are named
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")  # set by torchrun, Lightning, a cluster's script, srun


def is_main_process() -> bool:
    """Whether this is the first of all the processes that torchrun, srun or Lightning have started, or the only one."""
    # Lightning's children inside srun have the SLURM_PROCID of their parent: every number that is there counts.
    return all(int(os.environ.get(name, "0")) == 0 for name in RANKS)


def main_console() -> Console:
    """Where the main process prints; the others print nothing."""
    return Console(quiet=not is_main_process())


def table_console() -> Console:
    """Where tables are printed: as wide as the terminal, in a file or a pipe with room for all columns."""
    free = not sys.stdout.isatty() and not os.environ.get("COLUMNS")
    return Console(width=FILE_WIDTH if free else None)


def print_facts(console: Console, facts: Mapping[str, str]) -> None:
    """Name and value, a line each."""
    width = max(len("evaluation"), *map(len, facts))  # lists that follow each other share their columns
    for name, value in facts.items():
        console.print(f"[bold]{name:<{width}}[/bold]  {escape(value)}", highlight=False, soft_wrap=True)


def report_left_out(console: Console, left_out: Sequence[LeftOut]) -> None:
    """Name the first samples that are not in the data set, and how many there are."""
    for sample in left_out[:NAMED]:
        console.print(f"left out: {sample.name}: {sample.reason}", highlight=False, markup=False, soft_wrap=True)
    if left_out:
        console.print(f"{len(left_out):,} left out in all")
