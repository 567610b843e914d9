"""From a folder of WebDataset tars, ours or foreign, to a data set: every tar is read once, in parallel."""

import errno
import hashlib
import re
import shutil
from collections.abc import Container, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from data.arguments import ArgumentError, require
from data.locks import file_lock
from data.shards import images
from data.shards.dataset import ROWS_FOLDER, SPLITS, Dataset, check_index
from data.shards.index_writer import class_names, merge_classes, statistics_shares, write_dataset
from data.shards.manifest import MANIFEST, read_manifest, write_manifest
from data.shards.parallel import Part, available_cores, map_tasks
from data.shards.remote_index import Tars, fetch_index, list_remote_tars, origin_of, save_versions
from data.shards.rows import SplitRows, read_split, rows_path, save_rows, saved_names
from data.shards.sources import SPLIT_FOLDERS
from data.shards.tars import SkippedSample, TarTask, read_shard
from data.storage.local import Version
from data.storage.location import Root, Url, join
from data.storage.tars import list_tars

LOCK_SECONDS = 6 * 3600.0  # limit for another process that reads the tars; its lock ends with it
POOL_SHARDS = 4  # up to here, reading is faster than the imports of another process
SPLIT_WORDS = SPLIT_FOLDERS | {"training": "train", "dev": "val", "eval": "val", "testing": "test"}


class NotADatasetError(ArgumentError):
    """A folder contains neither a packed data set nor a tar."""


def open_dataset(
    root: Root, folder: Path | None = None, *, label_field: str = "label"
) -> tuple[Dataset, list[SkippedSample]]:
    """Open a data set; index the tars first, in one process, if they have no manifest or have changed.

    `folder` is for manifest and indexes, by default `root`; both are checked. An edited manifest gets a new digest.
    With a URL, manifest and indexes beside the tars are used if the tars have the sizes in it.
    Also returns the samples that indexing has just skipped. Raises: ValueError when this is not a data set, a file is
    damaged or missing, or `folder` cannot be written to.
    """
    folder, tars = find_tars(root, folder)
    opened = _open_dataset(root, folder, tars=tars, label_field=label_field)
    if isinstance(root, Url):
        with suppress(OSError):  # without them the store is listed once more
            save_versions(folder, tars)
    return opened


def _open_dataset(root: Root, folder: Path, *, tars: Tars, label_field: str) -> tuple[Dataset, list[SkippedSample]]:
    current = partial(_current_dataset, root, folder, tars=tars, label_field=label_field)
    dataset = current()
    if dataset and not dataset.is_edited:
        return dataset, []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(folder / ".lock", seconds=LOCK_SECONDS):
            dataset = current()  # another process may have been faster
            if (
                dataset is None
                and isinstance(root, Url)
                and fetch_index(root, folder, tars=tars, label_field=label_field)
            ):
                dataset = current()
            if dataset is None:
                return _index_tars(root, folder, tars=tars, label_field=label_field)
            if dataset.is_edited:
                write_manifest(dataset)
            return dataset, []
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            if dataset:  # edited by someone who may write here
                return dataset, []
            raise ArgumentError(f"{error}: ", ("folder", "FOLDER"), " puts manifest and index elsewhere") from error
        raise


def manifest_digest(dataset: Dataset) -> str:
    """Return the SHA-256 of the manifest, by which another process recognises the data set."""
    return hashlib.sha256((dataset.folder / MANIFEST).read_bytes()).hexdigest()


def follow_dataset(root: Root, folder: Path, *, digest: str | None = None) -> Dataset | None:
    """Return the data set that another process has just opened; its tars are neither listed nor compared.

    None where `folder` has no manifest, or one of another `digest`. Raises: ValueError for a damaged one.
    """
    if not (folder / MANIFEST).is_file():
        return None
    dataset = read_manifest(folder, root)
    return dataset if digest in (None, manifest_digest(dataset)) else None


def index_part(root: Root, folder: Path | None, *, part: Part, label_field: str = "label") -> int:
    """Read this part of the tars and keep their rows for `open_dataset`; return the number of tars.

    Parts may run at once on several machines that share `folder`. Raises: ValueError as `open_dataset`; OSError.
    """
    folder, tars = find_tars(root, folder)
    tasks = [task for tasks in _tasks(folder, tars, label_field=label_field).values() for task in tasks.items()]
    mine = dict(part.of(tasks))
    if _current_dataset(root, folder, tars=tars, label_field=label_field):
        return len(mine)
    _read_tars(root, folder, tasks=mine, label=f"index part {part}", label_field=label_field)
    return len(mine)


def check_parts(root: Root, folder: Path | None, *, label_field: str = "label") -> None:
    """Raise ValueError unless the data set is complete or `index_part` has read each of its tars."""
    folder, tars = find_tars(root, folder)
    if _current_dataset(root, folder, tars=tars, label_field=label_field):
        return
    known = saved_names(folder)
    tasks = _tasks(folder, tars, label_field=label_field)
    missing = [task.file for one in tasks.values() for path, task in one.items() if path.name not in known]
    if missing:
        raise ValueError(f"{len(missing)} tars have not been read, {missing[0]} is the first: run their parts again")


def find_tars(root: Root, folder: Path | None) -> tuple[Path, Tars]:
    """Return the folder of the index and the tars by split. Raises: ValueError as `open_dataset`."""
    if isinstance(root, Url):
        if folder is None:
            raise ArgumentError(("root", root), " is a URL: ", ("folder", "FOLDER"), " keeps manifest and index here")
        versions = list_remote_tars(root)
    else:
        folder = folder or root
        require(root.is_dir(), "is not a folder: give the one that contains the tars", root=root)
        versions = list_tars(root)
    _check_complete(root, folder, present=versions)
    return folder, _tars_by_split(root, versions)


def _tars_by_split(root: Root, versions: Mapping[str, Version]) -> Tars:
    """Group tars by split: a word of the path, or `train`. Raises: ValueError without tars."""
    splits: dict[str, dict[str, Version]] = {}
    for file in versions:
        words = re.split(r"[^a-z]+", file.lower())
        split = next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train")
        splits.setdefault(split, {})[file] = versions[file]
    if not splits:
        paths = [] if isinstance(root, Url) else (path for one in ("*.tar.*", "*.tgz") for path in root.rglob(one))
        compressed = next(iter(paths), None)
        if compressed is not None:
            raise ValueError(f"{compressed} is compressed, so it cannot be read by position: unpack it to a .tar")
        problem = f" is not a data set: it contains neither {MANIFEST} nor a .tar file"
        raise NotADatasetError(("root", root), problem)
    return {split: splits[split] for split in SPLITS if split in splits}


def _check_complete(root: Root, folder: Path, *, present: Container[str]) -> None:
    """Raise ValueError for a tar that the manifest lists and that is not there."""
    if not (folder / MANIFEST).is_file():
        return
    listed = [shard.file for split in read_manifest(folder, root).splits.values() for shard in split.shards]
    missing = [file for file in listed if file not in present]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        advice = "restore it, or remove that file to index the remaining tars (class names in it are lost)"
        raise ArgumentError(("root", root), f" lacks {missing[0]}{more}, listed in {folder / MANIFEST}: {advice}")


def _current_dataset(root: Root, folder: Path, *, tars: Tars, label_field: str) -> Dataset | None:
    """Return the data set of the manifest if its indexes belong to it and to the tars as they are now."""
    if not (folder / MANIFEST).is_file():
        return None
    dataset = read_manifest(folder, root)
    if dataset.splits.keys() != tars.keys():
        return None
    for name, split in dataset.splits.items():
        path = folder / split.index
        if not path.is_file() or split.origin != origin_of(tars[name], label_field=label_field):
            return None
        check_index(path, split)
    if dataset.is_edited:
        _check_edit(dataset)
    return dataset


def _check_edit(dataset: Dataset) -> None:
    """Raise ValueError when an edited manifest does not fit its indexes."""
    for split in dataset.splits.values():
        path = dataset.folder / split.index
        rows = pq.read_table(path, columns=["shard", "label"])
        samples, largest = np.bincount(rows.column("shard")).tolist(), int(np.max(rows.column("label")))
        edited = f"{dataset.folder / MANIFEST} was edited"
        if samples != [shard.samples for shard in split.shards]:
            raise ValueError(f"{edited}: its shards are not those of {path}; restore them, or remove both files")
        if largest >= len(dataset.classes):
            raise ValueError(f"{edited}: it has {len(dataset.classes)} classes, but {path} has labels up to {largest}")


def _index_tars(root: Root, folder: Path, *, tars: Tars, label_field: str) -> tuple[Dataset, list[SkippedSample]]:
    """Read every tar that has not been read, write indexes and manifest; return data set and skipped samples."""
    rows: dict[str, SplitRows] = {}
    for split, tasks in _tasks(folder, tars, label_field=label_field).items():
        _read_tars(root, folder, tasks=tasks, label=f"index {split}", label_field=label_field)
        rows[split] = _read_rows(root, tasks)
        if not rows[split].samples:
            skipped = rows[split].skipped
            first = f"; {skipped[0].name}: {skipped[0].reason}" if skipped else ""
            problem = f": the tars of split {split} contain no image with a label (.cls, or the .json field of "
            raise ArgumentError(("root", root), problem, ("label_field", label_field), f"){first}")
    name = root.name if isinstance(root, Url) else root.resolve().name
    classes = class_names(rows.get("train") or next(iter(rows.values())))
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder, root)
        name, classes = manifest.name, merge_classes(manifest.classes, classes)
    dataset = write_dataset(root, folder, rows=rows, name=name, classes=classes, label_field=label_field)
    shutil.rmtree(folder / ROWS_FOLDER, ignore_errors=True)
    return dataset, [sample for one in rows.values() for sample in one.skipped]


def _tasks(folder: Path, tars: Tars, *, label_field: str) -> dict[str, dict[Path, TarTask]]:
    """Return the tars of each split to read, by the path of their rows."""
    tasks = {}
    for split, files in tars.items():
        measured = split == "train" or "train" not in tars
        counts = statistics_shares(len(files)) if measured else [0] * len(files)
        one = [TarTask(file, count) for file, count in zip(files, counts, strict=True)]
        tasks[split] = {
            rows_path(folder, task, version=files[task.file], label_field=label_field): task for task in one
        }
    return tasks


def _read_tars(root: Root, folder: Path, *, tasks: Mapping[Path, TarTask], label: str, label_field: str) -> None:
    """Read the tars whose rows are not there."""
    (folder / ROWS_FOLDER).mkdir(parents=True, exist_ok=True)
    known = saved_names(folder)
    missing = [task for path, task in tasks.items() if path.name not in known]
    workers = available_cores() if len(missing) > POOL_SHARDS else 1
    read = partial(_read_tar, root=root, folder=folder, label_field=label_field)
    map_tasks(read, missing, sizes=[1] * len(missing), workers=workers, label=label, unit="shards")


def _read_tar(task: TarTask, *, root: Root, folder: Path, label_field: str) -> None:
    shard = read_shard(root, task, label_field=label_field, size_of=images.intact_size, scratch=folder)
    save_rows(folder, task, shard=shard, label_field=label_field)


def _read_rows(root: Root, tasks: Mapping[Path, TarTask]) -> SplitRows:
    changed = [task.file for path, task in tasks.items() if not path.is_file()]
    if changed:
        raise ValueError(f"{join(root, changed[0])} has changed while it was read: start again when it is complete")
    return read_split(tasks)
