"""Make or complete the index of tars: `python -m pipeline.index root=FOLDER`."""

import time

from omegaconf import DictConfig

from pipeline.cli.run import run_verb
from pipeline.cli.verb import Verb

VERB = Verb(
    "index",
    "Index WebDataset tars: dataset.json, and a table of samples for each split.",
    {
        "FOLDER": "the tars in FOLDER, which gets the index",
        "FOLDER out=OTHER": "for a FOLDER that must stay as it is",
        "s3://BUCKET/FOLDER out=OTHER": "tars in an object store",
        "FOLDER label_field=species": "labels from a field of .json files",
    },
    text_keys=("root", "out", "label_field"),
    positional="root",
)


def main(config: DictConfig) -> None:
    """Open the data set, which indexes its tars where they have no index or have changed; print what it has."""
    from rich.console import Console

    from data.storage.location import local_folder, parse_root
    from pipeline.build.source import open_tars
    from pipeline.cli.console import dataset_facts, print_facts
    from pipeline.cli.errors import config_keys_in_errors

    start, keys = time.perf_counter(), {"root": "root", "folder": "out", "label_field": "label_field"}
    with config_keys_in_errors(keys):
        root = parse_root(str(config.root))
        out = None if config.out is None else local_folder(str(config.out), folder=config.out)
    dataset = open_tars(root, out, label_field=str(config.label_field), keys=keys)
    print_facts(Console(), dataset_facts(dataset, seconds=time.perf_counter() - start))


if __name__ == "__main__":
    run_verb(VERB, main)
