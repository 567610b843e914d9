"""Pack images into shards: `python -m pipeline.pack source=folder source.root=PATH name=NAME`."""

import time

from omegaconf import DictConfig

from pipeline.cli.run import run_verb
from pipeline.cli.verb import Verb

VERB = Verb(
    "pack",
    "Pack images into shuffled WebDataset shards with a manifest (dataset.json) and an index.",
    {
        "": "scikit-learn's digits",
        "source=folder source.root=PATH name=NAME": "class folders",
        "... part=3/16": "the third of 16 parts, on one of several machines",
        "... part=merge": "a data set from its parts",
    },
    text_keys=("name", "out", "source.root", "part"),
)


def main(config: DictConfig) -> None:
    """Read the source, write the data set, print what was written and what was skipped."""
    from rich.console import Console

    from data.shards.images import SUFFIXES
    from pipeline.build.source import pack_source
    from pipeline.cli.console import dataset_facts, print_facts, print_line, print_skipped

    console, start = Console(), time.perf_counter()
    packed = pack_source(config)
    seconds = time.perf_counter() - start
    if isinstance(packed, int):
        print_facts(console, {"part": f"{config.part}: {packed:,} tars", "time": f"{seconds:.1f} s"})
        return
    print_skipped(console, packed.skipped)
    for kind, count in packed.ignored.most_common():
        print_line(console, f"ignored {count:,} {kind} files: not {', '.join(SUFFIXES)}")
    print_facts(console, dataset_facts(packed.dataset, seconds=seconds))


if __name__ == "__main__":
    run_verb(VERB, main)
