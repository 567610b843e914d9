"""Terminal output shared by the verbs, and which of several processes prints."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from pipeline.cli.compose import CONF

if TYPE_CHECKING:
    from data.shards.dataset import Dataset
    from data.shards.tars import SkippedSample

TABLE_WIDTH = 160  # columns, where the output is a file or a pipe
NUM_NAMED = 10  # skipped samples that are named
NUM_NAMED_CLASSES = 10
LABEL_WIDTH = 10  # columns of a fact's name at least, so that consecutive lists align
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")  # set by torchrun, Lightning, a cluster's script, srun


def is_main_process() -> bool:
    """Return whether this is the only process, or rank 0 of those started by torchrun, srun or Lightning."""
    # Lightning's children under srun inherit their parent's SLURM_PROCID, so all variables that are set must be 0.
    return all(int(os.environ.get(name, "0")) == 0 for name in RANKS)


def main_console() -> Console:
    """Return a console that prints in the main process only."""
    return Console(quiet=not is_main_process())


def table_console() -> Console:
    """Return a console for tables: as wide as the terminal, or wide enough for all columns in a file or pipe."""
    has_no_width = not sys.stdout.isatty() and not os.environ.get("COLUMNS")
    return Console(width=TABLE_WIDTH if has_no_width else None)


def print_line(console: Console, text: str) -> None:
    """Print text as it is: without markup, emoji codes and colours, in one line however long."""
    console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


def print_facts(console: Console, facts: Mapping[str, str]) -> None:
    """Print names and values, a line each."""
    width = max(LABEL_WIDTH, *map(len, facts))
    for name, value in facts.items():
        console.print(f"[bold]{name:<{width}}[/bold]  {escape(value)}", highlight=False, soft_wrap=True)


def print_skipped(console: Console, skipped: Sequence[SkippedSample]) -> None:
    """Name the first samples that are missing from a data set, and count all of them."""
    for sample in skipped[:NUM_NAMED]:
        print_line(console, f"skipped: {sample.name}: {sample.reason}")
    if skipped:
        print_line(console, f"{len(skipped):,} skipped in all")


def dataset_facts(dataset: Dataset, *, seconds: float) -> dict[str, str]:
    """Return name, images, classes and colours of a data set, the time that it took, and the next command."""
    num_images = sum(split.samples for split in dataset.splits.values())
    splits = [f"{name} {split.samples:,} (tars: {len(split.shards):,})" for name, split in dataset.splits.items()]
    classes, more = dataset.classes[:NUM_NAMED_CLASSES], len(dataset.classes) > NUM_NAMED_CLASSES
    return {
        "data set": f"{dataset.name} in {dataset.folder}",
        "images": ", ".join(splits),
        "classes": f"{len(dataset.classes):,}: {', '.join(classes)}{', ...' if more else ''}",
        "mean": ", ".join(f"{value:.4f}" for value in dataset.mean),
        "std": ", ".join(f"{value:.4f}" for value in dataset.std),
        "time": f"{seconds:.1f} s, {num_images / seconds:,.0f} images/s",
        "next": f"python -m pipeline.train +model=resnet {_overrides_of(dataset)}",
    }


def _overrides_of(dataset: Dataset) -> str:
    """Return the overrides with which a training reads a data set."""
    folder = dataset.folder
    if (CONF / "data" / f"{folder.name}.yaml").is_file() and folder == Path("datasets", folder.name):
        return f"data={folder.name}"
    index = "" if dataset.root == folder else f" data.index={folder}"
    return f"data=shards data.root={dataset.root}{index}"
