"""From a source to shuffled tar shards, a manifest and an index: the same bytes for the same images and seed.

Each shard is written, then read back by the code that indexes anybody's tars, so
that what the index says is what is there.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import webdataset as wds

from data.loading import order
from data.shards import images
from data.shards.dataset import SPLITS, Dataset, read_manifest
from data.shards.indexing import assemble, statistics_shares
from data.shards.parallel import available_cores, map_tasks
from data.shards.sources import Item, Source
from data.shards.tars import LeftOut, ShardRows, read_shard

IMAGES_WORTH_A_POOL = 4_000  # fewer are packed before another process has imported what it needs


@dataclass(frozen=True)
class ShardPlan:
    """A tar to write: its split, its name and its items in their order."""

    split: str
    file: str
    items: list[Item]
    statistics_images: int


@dataclass(frozen=True)
class Packed:
    """The data set that packing wrote, and what it left out."""

    dataset: Dataset
    left_out: list[LeftOut]
    ignored: Counter[str]


def pack(
    source: Source,
    folder: Path,
    *,
    seed: int = 0,
    shard_samples: int = 1000,
    resize: int | None = None,
    strict: bool = False,
) -> Packed:
    """Write `source` as a data set into `folder`, which appears whole or not at all.

    `shard_samples` images a shard; `resize` re-encodes larger images to that shorter
    side in pixels, otherwise bytes are copied. Unreadable images are left out and
    reported, or end the work when `strict`.

    Raises: FileExistsError when `folder` exists; ValueError.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists: remove it, or choose another name")
    if shard_samples < 1:
        raise ValueError(f"shard_samples={shard_samples} must be at least 1")
    if resize is not None and (not isinstance(resize, int) or resize < 1):
        raise ValueError(f"resize={resize} must be null or a whole number of pixels, at least 1")
    if len(source.classes) < 2:
        raise ValueError(f"{source.name} has one class, {source.classes[0]}: a classifier needs at least 2")
    plans = plan_shards(source, seed=seed, shard_samples=shard_samples)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial_folder = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    partial_folder.chmod(0o755)  # mkdtemp keeps to itself what is no secret
    try:
        write = partial(write_shard, partial_folder, resize=resize, strict=strict)
        sizes = [len(plan.items) for plan in plans]
        workers = available_cores() if sum(sizes) > IMAGES_WORTH_A_POOL else 1
        shards = map_tasks(write, plans, workers=workers, label=f"pack {source.name}", unit="images", sizes=sizes)
        by_split: dict[str, list[ShardRows]] = {}
        for plan, rows in zip(plans, shards, strict=True):
            by_split.setdefault(plan.split, []).append(rows)
        check_classes(source, by_split)
        assemble(partial_folder, partial_folder, shards=by_split, name=source.name, classes=source.classes)
        partial_folder.rename(folder)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    left_out = [sample for rows in shards for sample in rows.left_out]
    return Packed(read_manifest(folder, folder), left_out, source.ignored)


def check_classes(source: Source, shards: dict[str, list[ShardRows]]) -> None:
    """Raise ValueError when every image of a class was left out of a split."""
    for split, rows in shards.items():
        labels = {label for shard in rows for label in shard.labels}
        expected = {item.label for item in source.splits[split]}
        for label in sorted(expected - labels):
            raise ValueError(f"class {source.classes[label]} has no readable image in split {split}")


def plan_shards(source: Source, *, seed: int, shard_samples: int) -> list[ShardPlan]:
    """Shuffle each split by `seed` and cut it into shards; a split's last shard may be smaller."""
    plans = []
    for number, split in enumerate(SPLITS):
        items = source.splits.get(split, [])
        places: order.Samples = order.permute(
            np.arange(len(items)), len(items), permutation=order.key(order.PACK, seed, number)
        )
        shuffled = [items[place] for place in places]
        cuts = range(0, len(shuffled), shard_samples)
        counts = statistics_shares(len(cuts)) if split == "train" else [0] * len(cuts)
        for shard, (start, count) in enumerate(zip(cuts, counts, strict=True)):
            plans.append(ShardPlan(split, f"{split}-{shard:06d}.tar", shuffled[start : start + shard_samples], count))
    return plans


def write_shard(folder: Path, plan: ShardPlan, *, resize: int | None, strict: bool) -> ShardRows:
    """Write one tar with webdataset's writer and read its rows back.

    Raises: UnreadableImage, named with its path, when `strict`.
    """
    left_out = []
    # A fixed modification time: the bytes of a shard are those of its images, not those of the day.
    with open(folder / plan.file, "wb") as stream, wds.TarWriter(stream, encoder=False, mtime=0) as writer:
        for item in plan.items:
            try:
                original = item.read()
                images.check_whole(original)
                encoded = original if resize is None else images.shrink(original, resize)
            except (OSError, images.UnreadableImage) as error:
                if strict:
                    raise images.UnreadableImage(f"{item.path}: {error}") from error
                left_out.append(LeftOut(str(item.path or item.key), str(error)))
                continue
            suffix = item.suffix if encoded is original else "jpg"
            writer.write({"__key__": item.key, suffix: encoded, "cls": str(item.label).encode()})
    count = plan.statistics_images
    rows = read_shard(folder, plan.file, label_field="label", statistics_images=count, size_of=images.oriented_size)
    rows.left_out = left_out + rows.left_out
    return rows
