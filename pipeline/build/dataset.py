"""What verbs share of data sets: pack the one that comes with the project on first use, open any other."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock
from rich.console import Console

from data.shards.dataset import Dataset
from data.shards.indexing import open_dataset
from pipeline.cli.config import compose
from pipeline.cli.console import report_left_out


def open_or_pack(root: str, *, index: str | None, label_field: str, source: str | None) -> Dataset:
    """Open the data set in `root`; with a `source`, a config of that group packs it first where it is missing.

    One process of many does the work, and says so, whichever it is.

    Raises: FileNotFoundError, ValueError when the root is no data set.
    """
    if source is not None:
        pack_first(source, Path(root))
    dataset, left_out = open_dataset(Path(root), None if index is None else Path(index), label_field=label_field)
    report_left_out(Console(), left_out)
    return dataset


def pack_first(source: str, root: Path) -> None:
    """Pack what `conf/source/<source>.yaml` describes into `root`, unless another process has."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.with_name(f".{root.name}.lock")):
        if not root.exists():
            from pipeline.pack import pack_source

            Console().print(f"packing {source} into {root}", highlight=False)
            pack_source(compose("pack", [f"source={source}", f"out={root}"]))
