"""From a source to shuffled tar shards, a manifest and an index: the same bytes for the same images and seed."""

import shutil
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import webdataset as wds

from data import draws
from data.arguments import require
from data.shards import images
from data.shards.dataset import SPLITS, Dataset
from data.shards.index_writer import statistics_shares, write_dataset
from data.shards.manifest import read_manifest
from data.shards.parallel import available_cores, map_tasks
from data.shards.sources import Item, Source
from data.shards.tars import ShardRows, SkippedSample, TarTask, read_shard

POOL_IMAGES = 4_000  # up to here, packing is faster than the imports of another process


class _ShardPlan(NamedTuple):
    """A tar to write: its split, the task to read it back, its items in order."""

    split: str
    tar: TarTask
    items: list[Item]


class Packed(NamedTuple):
    """The data set that was written, the skipped samples, and the source's ignored files by suffix."""

    dataset: Dataset
    skipped: list[SkippedSample]
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
    """Write `source` as a data set into `folder`, which appears only when it is complete.

    `resize` re-encodes larger images to that shorter side in pixels; None copies the bytes. Unreadable images are
    skipped and returned, or raise when `strict`. Raises: FileExistsError when `folder` has files; ValueError.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists: remove it, or choose another name")
    require(shard_samples >= 1, "must be at least 1", shard_samples=shard_samples)
    is_valid = resize is None or (isinstance(resize, int) and resize >= 1)
    require(is_valid, "must be an integer of at least 1 pixel, or unset to copy the bytes", resize=resize)
    if len(source.classes) < 2:
        raise ValueError(f"{source.name} has one class, {source.classes[0]}: a classifier needs at least 2")
    plans = _plan_shards(source, seed=seed, shard_samples=shard_samples)
    sizes = [len(plan.items) for plan in plans]
    workers = available_cores() if sum(sizes) > POOL_IMAGES else 1
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial_folder = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    partial_folder.chmod(0o755)  # mkdtemp creates 0700; data sets are readable by all
    try:
        write = partial(_write_shard, partial_folder, resize=resize, strict=strict)
        rows = map_tasks(write, plans, workers=workers, label=f"pack {source.name}", unit="images", sizes=sizes)
        shards: dict[str, list[ShardRows]] = {}
        for plan, shard in zip(plans, rows, strict=True):
            shards.setdefault(plan.split, []).append(shard)
        _check_classes(source, shards)
        write_dataset(partial_folder, partial_folder, shards=shards, name=source.name, classes=source.classes)
        partial_folder.rename(folder)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    return Packed(read_manifest(folder, folder), [sample for shard in rows for sample in shard.skipped], source.ignored)


def _check_classes(source: Source, shards: dict[str, list[ShardRows]]) -> None:
    for split, rows in shards.items():
        labels = {row.label for shard in rows for row in shard.rows}
        expected = {item.label for item in source.splits[split]}
        for label in sorted(expected - labels):
            raise ValueError(f"class {source.classes[label]} has no readable image in split {split}")


def _plan_shards(source: Source, *, seed: int, shard_samples: int) -> list[_ShardPlan]:
    """Shuffle each split by `seed` and cut it into shards; the last of a split may be smaller."""
    plans = []
    for number, split in enumerate(SPLITS):
        items = source.splits.get(split, [])
        permutation = draws.key(draws.PACK, seed, number)
        shuffled = [items[place] for place in draws.permute(np.arange(len(items)), len(items), permutation=permutation)]
        starts = range(0, len(items), shard_samples)
        measured = split == "train" or "train" not in source.splits
        counts = statistics_shares(len(starts)) if measured else [0] * len(starts)
        for shard, (start, count) in enumerate(zip(starts, counts, strict=True)):
            tar = TarTask(f"{split}-{shard:06d}.tar", count)
            plans.append(_ShardPlan(split, tar, shuffled[start : start + shard_samples]))
    return plans


def _write_shard(folder: Path, plan: _ShardPlan, *, resize: int | None, strict: bool) -> ShardRows:
    """Write one tar with webdataset's writer and read its rows back as from a foreign tar: the index describes it."""
    skipped = []
    # A fixed modification time: the bytes of a shard depend on its images, not on the day.
    with open(folder / plan.tar.file, "wb") as stream, wds.TarWriter(stream, encoder=False, mtime=0) as writer:
        for item in plan.items:
            try:
                original = item.read()
                images.check_intact(original)
                encoded = original if resize is None else images.shrink(original, resize)
            except (OSError, images.UnreadableImage) as error:
                if strict:
                    raise images.UnreadableImage(f"{item.path}: {error}") from error
                skipped.append(SkippedSample(str(item.path or item.key), str(error)))
                continue
            suffix = item.suffix if encoded is original else "jpg"
            writer.write({"__key__": item.key, suffix: encoded, "cls": str(item.label).encode()})
    shard = read_shard(folder, plan.tar, label_field="label", size_of=images.oriented_size)
    shard.skipped = skipped + shard.skipped
    return shard
