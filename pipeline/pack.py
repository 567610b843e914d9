"""Pack images into shards: `python -m pipeline.pack source=folder source.root=PATH name=NAME`."""

from __future__ import annotations

import time
from pathlib import Path

from omegaconf import DictConfig

from pipeline.config import run_verb


def main(config: DictConfig) -> None:
    """Read the source, write the data set, say what was written and what was left out."""
    from hydra.utils import instantiate
    from rich.console import Console

    from data.images import SUFFIXES
    from data.pack import pack
    from pipeline.console import print_facts, report_left_out

    console = Console()
    began = time.perf_counter()
    source = instantiate(config.source, name=config.name, val_fraction=config.val_fraction, seed=config.seed)
    packed = pack(
        source,
        Path(config.out),
        seed=config.seed,
        shard_samples=config.shard_samples,
        resize=config.resize,
        strict=config.strict,
    )
    seconds = time.perf_counter() - began
    report_left_out(console, packed.left_out)
    for suffix, count in packed.ignored.most_common():
        console.print(f"ignored {count:,} {suffix} files: no {', '.join(SUFFIXES)}", highlight=False)
    dataset = packed.dataset
    num_images = sum(split.samples for split in dataset.splits.values())
    first = ", ".join(dataset.classes[:10]) + (", ..." if len(dataset.classes) > 10 else "")
    splits = [f"{name} {split.samples:,} in {len(split.shards):,} shards" for name, split in dataset.splits.items()]
    facts = {
        "data set": f"{dataset.name} in {dataset.folder}",
        "images": ", ".join(splits),
        "classes": f"{len(dataset.classes):,}: {first}",
        "mean": ", ".join(f"{value:.4f}" for value in dataset.mean),
        "std": ", ".join(f"{value:.4f}" for value in dataset.std),
        "time": f"{seconds:.1f} s, {num_images / seconds:,.0f} images/s",
        "next": f"python -m pipeline.train +model=resnet data=shards data.root={dataset.folder}",
    }
    print_facts(console, facts)


if __name__ == "__main__":
    run_verb("pack", main)
