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
        "FOLDER part=3/16": "read the third of 16 parts, on one of several machines",
        "FOLDER part=merge": "the index, from its parts",
    },
    text_keys=("root", "out", "label_field", "part"),
    positional="root",
)


def main(config: DictConfig) -> None:
    """Open the data set, which indexes its tars where they have no index or have changed; print its contents."""
    from rich.console import Console

    from data.shards.indexing import check_parts, index_part
    from data.shards.parallel import parse_part
    from data.storage.location import local_folder, parse_root
    from pipeline.build.source import open_tars
    from pipeline.cli.console import dataset_facts, print_facts
    from pipeline.cli.errors import config_keys_in_errors

    start, keys = time.perf_counter(), {"root": "root", "folder": "out", "label_field": "label_field"}
    with config_keys_in_errors(keys):
        root = parse_root(str(config.root))
        out = None if config.out is None else local_folder(str(config.out), folder=config.out)
        label_field, part = str(config.label_field), None if config.part is None else parse_part(str(config.part))
        if part is not None:
            count = index_part(root, out, part=part, label_field=label_field)
            seconds = time.perf_counter() - start
            print_facts(Console(), {"part": f"{part}: {count:,} tars", "time": f"{seconds:.1f} s"})
            return
        if config.part is not None:
            check_parts(root, out, label_field=label_field)
    dataset = open_tars(root, out, label_field=label_field, keys=keys)
    print_facts(Console(), dataset_facts(dataset, seconds=time.perf_counter() - start))


if __name__ == "__main__":
    run_verb(VERB, main)
