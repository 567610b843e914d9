"""Pack images into shards: `python -m pipeline.pack source=folder source.root=PATH name=NAME`."""

import time
from pathlib import Path

from omegaconf import DictConfig

from pipeline.cli.errors import ConfigError
from pipeline.cli.run import run_verb
from pipeline.cli.verb import Verb


def check_values(config: DictConfig) -> None:
    """Raise ConfigError for values that no packing can have, whichever source it is of."""
    if config.name == ".." or Path(str(config.name)).name != str(config.name):
        raise ConfigError(f"name={config.name} is a path: out=FOLDER sets the data set's folder")
    if not 0 <= config.val_fraction < 1:
        raise ConfigError(f"val_fraction={config.val_fraction} must be at least 0 and less than 1")


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
    minimums={"seed": 0, "shard_samples": 1, "resize": 1},
    check_values=check_values,
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
