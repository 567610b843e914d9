"""Make or complete the index of tars: `python -m pipeline.index root=FOLDER`."""

import time
from pathlib import Path

from omegaconf import DictConfig

from pipeline.cli.run import run_verb
from pipeline.cli.verb import Verb

VERB = Verb(
    "index",
    "Index WebDataset tars: dataset.json, and a table of samples for each split.",
    {
        "FOLDER": "the tars in FOLDER, which gets the index",
        "FOLDER out=OTHER": "for a FOLDER that must stay as it is",
        "FOLDER label_field=species": "labels from a field of .json files",
    },
    text_keys=("root", "out", "label_field"),
    positional="root",
)


def main(config: DictConfig) -> None:
    """Open the data set, which indexes its tars where they have no index or have changed; print what it has."""
    from rich.console import Console

    from pipeline.build.source import open_tars
    from pipeline.cli.console import dataset_facts, print_facts

    root, start = Path(str(config.root)), time.perf_counter()
    out = None if config.out is None else Path(str(config.out))
    keys = {"root": "root", "folder": "out", "label_field": "label_field"}
    dataset = open_tars(root, out, label_field=str(config.label_field), keys=keys)
    print_facts(Console(), dataset_facts(dataset, seconds=time.perf_counter() - start))


if __name__ == "__main__":
    run_verb(VERB, main)
