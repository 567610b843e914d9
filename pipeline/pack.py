"""Pack images into shards: `python -m pipeline.pack source=folder source.root=PATH name=NAME`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from pipeline.cli.config import CONF, run_verb

if TYPE_CHECKING:
    from data.shards.pack import Packed


def main(config: DictConfig) -> None:
    """Read the source, write the data set, say what was written and what was left out."""
    from rich.console import Console

    from data.shards.images import SUFFIXES
    from pipeline.cli.console import print_facts, report_left_out

    console = Console()
    began = time.perf_counter()
    packed = pack_source(config)
    seconds = time.perf_counter() - began
    report_left_out(console, packed.left_out)
    for kind, count in packed.ignored.most_common():
        console.print(f"ignored {count:,} {kind} files: no {', '.join(SUFFIXES)}", highlight=False, markup=False)
    dataset = packed.dataset
    num_images = sum(split.samples for split in dataset.splits.values())
    first = ", ".join(dataset.classes[:10]) + (", ..." if len(dataset.classes) > 10 else "")
    splits = [f"{name} {split.samples:,} (tars: {len(split.shards):,})" for name, split in dataset.splits.items()]
    facts = {
        "data set": f"{dataset.name} in {dataset.folder}",
        "images": ", ".join(splits),
        "classes": f"{len(dataset.classes):,}: {first}",
        "mean": ", ".join(f"{value:.4f}" for value in dataset.mean),
        "std": ", ".join(f"{value:.4f}" for value in dataset.std),
        "time": f"{seconds:.1f} s, {num_images / seconds:,.0f} images/s",
        "next": f"python -m pipeline.train +model=resnet {chosen_by(dataset.folder)}",
    }
    print_facts(console, facts)


def pack_source(config: DictConfig) -> Packed:
    """Pack the source of a config of this verb."""
    from hydra.utils import instantiate

    from data.shards.pack import pack

    if Path(str(config.name)).name != str(config.name):
        raise ValueError(f"name={config.name} is a path: out=FOLDER says where the data set goes")
    source = instantiate(config.source, name=config.name, val_fraction=config.val_fraction, seed=config.seed)
    return pack(
        source,
        Path(str(config.out)),
        seed=config.seed,
        shard_samples=config.shard_samples,
        resize=config.resize,
        strict=config.strict,
    )


def chosen_by(folder: Path) -> str:
    """What makes `train` take this data set: the config made for it, or that of any."""
    made_for = CONF / "data" / f"{folder.name}.yaml"
    if made_for.is_file() and folder == Path("datasets", folder.name):
        return f"data={folder.name}"
    return f"data=shards data.root={folder}"


if __name__ == "__main__":
    run_verb("pack", main)
