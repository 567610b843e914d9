"""Pack images into shards: `python -m pipeline.pack source=folder source.root=PATH name=NAME`."""

import time
from pathlib import Path

from omegaconf import DictConfig

from pipeline.cli.compose import CONF
from pipeline.cli.run import run_verb
from pipeline.cli.verb import Verb

VERB = Verb(
    "pack",
    "Pack images into shuffled WebDataset shards with a manifest (dataset.json) and an index.",
    {"": "scikit-learn's digits", "source=folder source.root=PATH name=NAME": "class folders"},
    text_keys=("name", "out", "source.root"),
)
NUM_NAMED_CLASSES = 10


def main(config: DictConfig) -> None:
    """Read the source, write the data set, print what was written and what was skipped."""
    from rich.console import Console

    from data.shards.images import SUFFIXES
    from pipeline.build.source import pack_source
    from pipeline.cli.console import print_facts, print_skipped

    console, start = Console(), time.perf_counter()
    packed = pack_source(config)
    seconds = time.perf_counter() - start
    print_skipped(console, packed.skipped)
    for kind, count in packed.ignored.most_common():
        console.print(f"ignored {count:,} {kind} files: not {', '.join(SUFFIXES)}", highlight=False, markup=False)
    dataset = packed.dataset
    num_images = sum(split.samples for split in dataset.splits.values())
    splits = [f"{name} {split.samples:,} (tars: {len(split.shards):,})" for name, split in dataset.splits.items()]
    folder, has_own_config = dataset.folder, (CONF / "data" / f"{dataset.folder.name}.yaml").is_file()
    uses_default = has_own_config and folder == Path("datasets", folder.name)
    overrides = f"data={folder.name}" if uses_default else f"data=shards data.root={folder}"
    classes, more = dataset.classes[:NUM_NAMED_CLASSES], len(dataset.classes) > NUM_NAMED_CLASSES
    facts = {
        "data set": f"{dataset.name} in {dataset.folder}",
        "images": ", ".join(splits),
        "classes": f"{len(dataset.classes):,}: {', '.join(classes)}{', ...' if more else ''}",
        "mean": ", ".join(f"{value:.4f}" for value in dataset.mean),
        "std": ", ".join(f"{value:.4f}" for value in dataset.std),
        "time": f"{seconds:.1f} s, {num_images / seconds:,.0f} images/s",
        "next": f"python -m pipeline.train +model=resnet {overrides}",
    }
    print_facts(console, facts)


if __name__ == "__main__":
    run_verb(VERB, main)
