"""From a source to shuffled tar shards, a manifest and an index: the same bytes for the same images and seed.

Tars are written into `.NAME.partial` beside the folder of the data set, each with its rows, so that packing continues
after a stop and several machines can share it.
"""

import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import webdataset as wds

from data import draws
from data.arguments import require
from data.locks import file_lock, lock_holder
from data.shards import images
from data.shards.dataset import ROWS_FOLDER, SPLITS, Dataset, partial_folder, write_atomically
from data.shards.index_writer import statistics_shares, write_dataset
from data.shards.manifest import read_manifest
from data.shards.parallel import Part, available_cores, map_tasks
from data.shards.rows import SplitRows, read_split, rows_path, save_rows, saved_names
from data.shards.sources import Item, Source, digest_of, labels_of
from data.shards.tars import SkippedSample, TarTask, read_shard
from data.storage.local import Version

POOL_IMAGES = 4_000  # up to here, packing is faster than the imports of another process
LABEL_FIELD = "label"  # unused: packed samples have a .cls
PLAN = "plan.json"
LOCK_SECONDS = 60.0  # limit for another part that writes the plan


@dataclass(frozen=True)
class PackSettings:
    """How images become tars of `shard_samples` images in an order that `seed` shuffles.

    `resize` re-encodes larger images to that shorter side in pixels; None copies the bytes. Unreadable images are
    skipped, or end the packing when `strict`. Raises: ArgumentError.
    """

    seed: int = 0
    shard_samples: int = 1000
    resize: int | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        require(self.shard_samples >= 1, "must be at least 1", shard_samples=self.shard_samples)
        is_valid = self.resize is None or (isinstance(self.resize, int) and self.resize >= 1)
        require(is_valid, "must be an integer of at least 1 pixel, or unset to copy the bytes", resize=self.resize)


class Packed(NamedTuple):
    """The data set that was written, the skipped samples, and the source's ignored files by suffix."""

    dataset: Dataset
    skipped: list[SkippedSample]
    ignored: Counter[str]


class _ShardPlan(NamedTuple):
    """A tar to write: its split, the task to read it back, and the positions of its items in the shuffled split."""

    split: str
    tar: TarTask
    positions: range


class _WriteTask(NamedTuple):
    tar: TarTask
    items: list[Item]


DEFAULTS = PackSettings()


def pack(source: Source, folder: Path, *, settings: PackSettings = DEFAULTS) -> Packed:
    """Write `source` as a data set into `folder`, which appears only when it is complete.

    Shards that `pack_part` or a packing that was stopped has written are kept.
    Raises: FileExistsError when `folder` has files; ValueError, also when other values began it; OSError.
    """
    packing = _Packing(source, folder, settings=settings)
    with packing.alone():
        packing.write(packing.plans, label=f"pack {source.name}")
        return packing.merge()


def pack_part(source: Source, folder: Path, *, part: Part, settings: PackSettings = DEFAULTS) -> int:
    """Write this part of the shards of `source`, and return their number; `merge_parts` makes them a data set.

    Parts may run at once on several machines that share the parent of `folder`. Raises: as `pack`.
    """
    packing = _Packing(source, folder, settings=settings)
    plans = part.of(packing.plans)
    packing.write(plans, label=f"pack {source.name}, part {part}")
    return len(plans)


def merge_parts(source: Source, folder: Path, *, settings: PackSettings = DEFAULTS) -> Packed:
    """Make a data set of what `pack_part` has written. Raises: as `pack`; ValueError when a shard is missing."""
    packing = _Packing(source, folder, settings=settings)
    with packing.alone():
        missing = packing.missing(packing.plans)
        if missing:
            count = f"{len(missing)} of {len(packing.plans)} shards are missing"
            raise ValueError(f"{count}, {missing[0].tar.file} is the first: run their parts again")
        return packing.merge()


class _Packing:
    """A source on its way into a folder. Raises: as `pack`."""

    def __init__(self, source: Source, folder: Path, *, settings: PackSettings) -> None:
        self.source, self.folder, self.settings = source, folder, settings
        self.partial = partial_folder(folder)
        self._check_folder()
        if len(source.classes) < 2:
            raise ValueError(f"{source.name} has one class, {source.classes[0]}: a classifier needs at least 2")
        self.plans = _plan_shards(source, settings.shard_samples)
        (self.partial / ROWS_FOLDER).mkdir(parents=True, exist_ok=True)
        self._check_plan()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only process that may complete the folder; remove what a complete one needs no more."""
        lock = self.partial / ROWS_FOLDER / "lock"
        with ExitStack() as stack:
            try:
                stack.enter_context(file_lock(lock, seconds=0))
            except TimeoutError:
                raise FileExistsError(f"{self.folder} is being packed by {lock_holder(lock)}") from None
            self._check_folder()
            yield
        # After the lock, which is among them: many rows take longer to remove than a lease may stay without renewal.
        shutil.rmtree(self.folder / ROWS_FOLDER, ignore_errors=True)

    def missing(self, plans: Sequence[_ShardPlan]) -> list[_ShardPlan]:
        """Return the shards that are not there with their rows."""
        known = saved_names(self.partial)
        return [plan for plan in plans if getattr(self._rows_path(plan), "name", None) not in known]

    def write(self, plans: Sequence[_ShardPlan], *, label: str) -> None:
        """Write the shards that are missing."""
        missing = self.missing(plans)
        sizes = [len(plan.positions) for plan in missing]
        tasks = (_WriteTask(plan.tar, self._items(plan)) for plan in missing)
        workers = available_cores() if sum(sizes) > POOL_IMAGES else 1
        write = partial(_write_shard, self.partial, resize=self.settings.resize, strict=self.settings.strict)
        map_tasks(write, tasks, sizes=sizes, workers=workers, label=label, unit="images")

    def merge(self) -> Packed:
        """Write index and manifest, and give the folder its name."""
        paths: dict[str, list[Path]] = {}
        for plan in self.plans:
            path = self._rows_path(plan)
            assert path is not None, f"{plan.tar.file} has been written"
            paths.setdefault(plan.split, []).append(path)
        rows = {split: read_split(one) for split, one in paths.items()}
        skipped = [sample for one in rows.values() for sample in one.skipped]
        if skipped and self.settings.strict:  # by a packing that was not, which this one continues
            raise images.UnreadableImage(f"{skipped[0].name}: {skipped[0].reason}")
        _check_classes(self.source, rows)
        write_dataset(self.partial, self.partial, rows=rows, name=self.source.name, classes=self.source.classes)
        self.partial.rename(self.folder)
        return Packed(read_manifest(self.folder, self.folder), skipped, self.source.ignored)

    def _rows_path(self, plan: _ShardPlan) -> Path | None:
        """Return the path of a shard's rows, which depends on its tar; None without a tar."""
        try:
            stat = (self.partial / plan.tar.file).stat()
        except FileNotFoundError:
            return None
        return rows_path(
            self.partial, plan.tar, version=Version(stat.st_size, stat.st_mtime_ns), label_field=LABEL_FIELD
        )

    def _items(self, plan: _ShardPlan) -> list[Item]:
        items = self.source.splits[plan.split]
        permutation = draws.key(draws.PACK, self.settings.seed, SPLITS.index(plan.split))
        places = draws.permute(np.asarray(plan.positions), len(items), permutation=permutation)
        return [items[place] for place in places.tolist()]

    def _check_folder(self) -> None:
        if self.folder.exists() and not (self.folder.is_dir() and not any(self.folder.iterdir())):
            raise FileExistsError(f"{self.folder} exists: remove it, or choose another name")

    def _check_plan(self) -> None:
        """Record the values that decide the shards. Raises: ValueError when others began this packing."""
        path = self.partial / ROWS_FOLDER / PLAN
        settings = {name: value for name, value in asdict(self.settings).items() if name != "strict"}
        plan: dict[str, object] = {"name": self.source.name, "classes": list(self.source.classes), **settings}
        plan |= {split: digest_of(items) for split, items in self.source.splits.items()}
        with file_lock(path.with_suffix(".lock"), seconds=LOCK_SECONDS):  # parts may start at once
            if not path.exists():
                write_atomically(path, json.dumps(plan).encode())
        before = json.loads(path.read_bytes())
        differing = [key for key in before | plan if before.get(key) != plan.get(key)]
        if differing:
            key = differing[0]
            known = f"{key}={before.get(key)}" if key in settings else f"other images or names ({key})"
            raise ValueError(f"{self.partial} was begun with {known}: continue with the same, or remove that folder")


def _check_classes(source: Source, rows: dict[str, SplitRows]) -> None:
    for split, one in rows.items():
        for label in np.unique(labels_of(source.splits[split])).tolist():
            if str(label) not in one.labels:
                raise ValueError(f"class {source.classes[label]} has no readable image in split {split}")


def _plan_shards(source: Source, shard_samples: int) -> list[_ShardPlan]:
    """Cut each split into shards; the last of a split may be smaller."""
    plans = []
    for split in SPLITS:
        samples = len(source.splits.get(split, []))
        starts = range(0, samples, shard_samples)
        measured = split == "train" or "train" not in source.splits
        counts = statistics_shares(len(starts)) if measured else [0] * len(starts)
        for shard, (start, count) in enumerate(zip(starts, counts, strict=True)):
            tar = TarTask(f"{split}-{shard:06d}.tar", count)
            plans.append(_ShardPlan(split, tar, range(start, min(start + shard_samples, samples))))
    return plans


def _write_shard(folder: Path, task: _WriteTask, *, resize: int | None, strict: bool) -> None:
    """Write one tar with webdataset's writer and read its rows back as from a foreign tar: the index describes it."""
    # Not under the name of another process that writes the same shard, as a job that was given up for dead may do.
    path = folder / ROWS_FOLDER / f"{task.tar.file}.{socket.gethostname()}.{os.getpid()}"
    try:
        skipped = _write_tar(path, task.items, resize=resize, strict=strict)
        read = TarTask(path.name, task.tar.statistics_images)
        shard = read_shard(path.parent, read, label_field=LABEL_FIELD, size_of=images.oriented_size)
        shard.skipped = skipped + shard.skipped
        path.replace(folder / task.tar.file)
        save_rows(folder, task.tar, shard=shard, label_field=LABEL_FIELD)
    finally:
        path.unlink(missing_ok=True)


def _write_tar(path: Path, items: Sequence[Item], *, resize: int | None, strict: bool) -> list[SkippedSample]:
    """Write the images that can be read, and return the others. Raises: UnreadableImage when `strict`."""
    skipped = []
    # A fixed modification time: the bytes of a shard depend on its images, not on the day.
    with open(path, "wb") as stream, wds.TarWriter(stream, encoder=False, mtime=0) as writer:
        for item in items:
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
        writer.close()
        os.fsync(stream.fileno())
    return skipped
