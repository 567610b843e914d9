"""The checkpoints of a run on disk: each is complete or absent, and damage is found before one is used.

A checkpoint is `step-N.ckpt` beside `step-N.json`, its manifest, which is written last. A step that is saved again, as
after its evaluation, has its file in `step-N-again.ckpt`, so that the manifest stays true until it is replaced; a third
time it is `step-N.ckpt`. `last.ckpt` and `best.ckpt` are hard links to the newest checkpoint and to the one with the
best evaluation, or copies where the file system has no links.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.serialization import config as serialization

from pipeline.runs.hashing_file import HashingFile

FORMAT = 1
KEPT = 2  # newest checkpoints at least, beside the best one of each
LAST, BEST = "last.ckpt", "best.ckpt"
FILE = re.compile(r"step-(\d+)(?:-again)?\.(ckpt|json)")


@dataclass(frozen=True)
class Best:
    """The checkpoint with the best evaluation, and the value of its metric."""

    step: int
    score: float


@dataclass(frozen=True)
class Checkpoint:
    """The manifest of a checkpoint: optimizer step, size and SHA-256, and `best` as it was at this step.

    `journal` is the SHA-256 of the journal up to this step, and `journal_bytes` its length. `again` decides the name of
    the file.
    """

    step: int
    bytes: int
    sha256: str
    best: Best | None = None
    journal_bytes: int = 0
    journal: str = ""
    again: bool = False

    @property
    def file(self) -> str:
        """Name of the file in the folder."""
        return f"step-{self.step}{'-again' * self.again}.ckpt"


class FoundCheckpoint(NamedTuple):
    """The newest intact checkpoint, None without one, and a sentence for each damaged one."""

    checkpoint: Checkpoint | None
    damaged: list[str]


class CheckpointFolder:
    """A run's folder of checkpoints; the `num_kept` newest stay. One process writes; others may read meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path, self.num_kept = path, KEPT

    def write(self, state: Mapping[str, object], checkpoint: Checkpoint) -> Checkpoint:
        """Write a checkpoint, flush it to the disk, and remove older ones; size, SHA-256 and `again` are filled in.

        Raises: OSError, after which the older checkpoints stand.
        """
        before = self.find(checkpoint.step)
        checkpoint = replace(checkpoint, again=before is not None and not before.again)
        partial, target = self.path / f".{checkpoint.file}", self.path / checkpoint.file
        try:
            with HashingFile(partial) as file, _without_crc32():  # SHA-256 is the check
                torch.save(state, file)  # type: ignore[arg-type]  # it only writes and flushes
            partial.replace(target)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if isinstance(error.__context__, OSError):  # torch cannot close the file either, and says only that
                raise error.__context__ from None
            raise
        written = replace(checkpoint, bytes=file.bytes, sha256=file.sha256.hexdigest())
        self.describe(written)
        self._link(LAST, written.step)
        if written.best is not None:
            self._link(BEST, written.best.step)
        self._remove_older()
        return written

    def describe(self, checkpoint: Checkpoint) -> None:
        """Write the manifest of a checkpoint, and flush it to the disk. Raises: OSError."""
        content = {"format": FORMAT, **asdict(checkpoint)}
        text = json.dumps({**content, "digest": _digest(content)}, indent=1)
        path = self.path / f"step-{checkpoint.step}.json"
        partial = path.with_name(f".{path.name}")
        try:
            with partial.open("w") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            flush_folder(self.path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def manifests(self) -> Iterator[Path]:
        """Yield the manifests of complete checkpoints, the newest first."""
        yield from (self.path / f"step-{step}.json" for step in self._steps())

    def newest(self) -> FoundCheckpoint:
        """Return the newest intact checkpoint, after reading each file until one is intact.

        Raises: OSError for a file that cannot be read and may be intact.
        """
        damaged = list[str]()
        for manifest in self.manifests():
            try:
                checkpoint = load_manifest(manifest)
                check_intact(self.path / checkpoint.file, checkpoint)
                return FoundCheckpoint(checkpoint, damaged)
            except (ValueError, OSError) as error:
                if isinstance(error, OSError) and error.errno not in (errno.ENOENT, errno.EIO):
                    raise  # no damage: another owner, a file server that does not answer
                damaged.append(str(error))
        return FoundCheckpoint(None, damaged)

    @property
    def last(self) -> Path | None:
        """The newest complete checkpoint, None without one."""
        if (link := self._existing(LAST)) is not None:
            return link
        steps = self._steps()
        return self._existing(self._file(steps[0])) if steps else None

    @property
    def best(self) -> Path | None:
        """The checkpoint with the best evaluation, None without one."""
        if (link := self._existing(BEST)) is not None:
            return link
        steps = self._steps()
        newest = self.find(steps[0]) if steps else None
        return self._existing(self._file(newest.best.step)) if newest and newest.best else None

    def find(self, step: int) -> Checkpoint | None:
        """Return the manifest of a step, None without a readable one."""
        with suppress(ValueError, OSError):
            return load_manifest(self.path / f"step-{step}.json")
        return None

    def tidy(self, newest: Checkpoint | None) -> None:
        """Remove what a kill has left, and checkpoints after `newest`, which are damaged; restore the links."""
        files = {self._file(step) for step in self._steps()}
        for path in self._files():
            match = FILE.fullmatch(path.name)
            is_later = match is not None and (newest is None or int(match[1]) > newest.step)
            is_unlisted = match is not None and path.suffix == ".ckpt" and path.name not in files
            if path.name.startswith(".") or is_later or is_unlisted:
                path.unlink(missing_ok=True)
        if newest is None:
            for name in (LAST, BEST):
                (self.path / name).unlink(missing_ok=True)
            return
        self._link(LAST, newest.step)
        if newest.best is not None:
            self._link(BEST, newest.best.step)

    def _steps(self) -> list[int]:
        """Return the steps that have a manifest, the newest first."""
        matches = (FILE.fullmatch(path.name) for path in self._files())
        return sorted((int(match[1]) for match in matches if match and match[2] == "json"), reverse=True)

    def _file(self, step: int) -> str:
        """Return the name of the checkpoint's file that a step's manifest describes, if it can be read."""
        return (self.find(step) or Checkpoint(step, 0, "")).file

    def _existing(self, name: str) -> Path | None:
        path = self.path / name
        return path if path.is_file() else None

    def _files(self) -> list[Path]:
        return list(self.path.iterdir()) if self.path.is_dir() else []

    def _link(self, name: str, step: int) -> None:
        """Give a checkpoint another name, atomically."""
        partial, target = self.path / f".{name}", self.path / self._file(step)
        partial.unlink(missing_ok=True)
        if not target.exists():  # somebody has removed it; what the name stands for may be its last copy
            return
        if (self.path / name).exists() and target.samefile(self.path / name):
            return  # a rename of one name of a file to another would leave both
        try:
            partial.hardlink_to(target)
        except OSError:
            shutil.copyfile(target, partial)
        partial.replace(self.path / name)

    def _remove_older(self) -> None:
        """Keep the newest checkpoints and their best ones; a manifest goes before its file."""
        steps: set[int] = set()
        for step in self._steps()[: self.num_kept]:
            checkpoint = self.find(step)
            if checkpoint is not None:
                steps |= {checkpoint.step} | ({checkpoint.best.step} if checkpoint.best else set())
        files = {self._file(step) for step in steps}
        for suffix in (".json", ".ckpt"):
            for path in self._files():
                match = FILE.fullmatch(path.name)
                is_old = match is not None and int(match[1]) not in steps
                if path.suffix == suffix and match and (is_old or (suffix == ".ckpt" and path.name not in files)):
                    path.unlink(missing_ok=True)


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Save without zip's check values, which cost more than SHA-256."""
    before = serialization.save.compute_crc32
    serialization.save.compute_crc32 = False
    try:
        yield
    finally:
        serialization.save.compute_crc32 = before


def load_manifest(path: Path) -> Checkpoint:
    """Read the manifest of a checkpoint. Raises: ValueError when it is damaged."""
    try:
        content = json.loads(path.read_bytes())
        if content.pop("digest") != _digest(content) or content.pop("format") != FORMAT:
            raise ValueError("its digest differs")
        best = content.pop("best")
        return Checkpoint(**content, best=Best(**best) if best else None)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def check_intact(file: Path, checkpoint: Checkpoint) -> None:
    """Raise ValueError, naming the file, unless it has the size and SHA-256 of its manifest."""
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    size = file.stat().st_size
    if size != checkpoint.bytes:
        raise ValueError(f"{file} is damaged: it has {size:,} bytes, its manifest says {checkpoint.bytes:,}")
    with file.open("rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != checkpoint.sha256:
            raise ValueError(f"{file} is damaged: its SHA-256 is not that of its manifest")


def check_listed(file: Path, sha256: str) -> None:
    """Raise ValueError for a checkpoint in a run's folder with a digest that no manifest there has.

    A file without manifests beside it passes: a copy of a checkpoint, or one of another program.
    """
    listed, has_manifests = set(), False
    for manifest in CheckpointFolder(file.parent).manifests():
        has_manifests = True
        with suppress(ValueError, OSError):
            listed.add(load_manifest(manifest).sha256)
    if has_manifests and (file.name in (LAST, BEST) or FILE.fullmatch(file.name)) and sha256 not in listed:
        advice = "remove it to use the file that it was a link to" if file.name in (LAST, BEST) else "name another one"
        raise ValueError(f"{file} is damaged: its SHA-256 is in no manifest beside it; {advice}")


def flush_folder(path: Path) -> None:
    """Flush the names in a folder to the disk, so that a rename survives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
