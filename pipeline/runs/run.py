"""A run's folder: its name, its config, its metrics as lines of JSON, and the file that says it has ended well."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from data.shards.dataset import Dataset, write_whole

FINAL = "result.json"
METRICS = "metrics.jsonl"
FINGERPRINT = "fingerprint.json"
# What does not change what is computed does not change the run's name either.
NOT_IN_NAME = (
    "name",
    "runs",
    "trust",
    "log_every",
    "tracking.",
    "weights.file",  # its SHA-256 stands for it
    "data.root",
    "data.index",
    "data.source",
    "data.threads",
    "data.readahead",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
)
# A run may go on where there are other devices, as long as they make the same global batches.
NOT_IN_FINGERPRINT = (
    *NOT_IN_NAME,
    "data.batch_size",
    "recipe.accumulate",
    "trainer.precision",  # what it comes to is compared
)

Values = Mapping[str, Any]  # of a config, by dotted key


@dataclass(frozen=True)
class Run:
    """The folder of a run; `name` stays the same when the same command is started again."""

    name: str
    folder: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def last_checkpoint(self) -> Path | None:
        """Where an unfinished run goes on, None at the beginning."""
        path = self.checkpoints / "last.ckpt"
        return path if path.is_file() else None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from the run's folder. Raises: ValueError when one has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(f"{self.folder} is held by a running process: add name=NAME for a new run") from error
        try:
            yield
        finally:
            lock.release()

    def begin(self, fingerprint: Values, config: str) -> None:
        """Make the folder; write down what the run computes, and the composed config as YAML."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / FINGERPRINT, json.dumps(fingerprint, indent=1).encode() + b"\n")
        write_whole(self.folder / "config.yaml", config.encode())

    def check(self, fingerprint: Values) -> None:
        """Raise ValueError, naming the first difference, when the run was begun with other values than these."""
        if self.last_checkpoint is None:
            return
        path = self.folder / FINGERPRINT
        if not path.is_file():
            raise ValueError(f"{path}, which says what the checkpoints compute, is missing: add name=NAME")
        begun = json.loads(path.read_text())
        for key in sorted(begun.keys() | fingerprint.keys()):
            was, now = begun.get(key), json.loads(json.dumps(fingerprint.get(key)))
            if was != now:
                raise ValueError(
                    f"{self.folder} was begun with {key}={was}, not {now}: add name=NAME for a new run, "
                    "or give the values it was begun with"
                )

    def record(self, values: Mapping[str, float], step: int) -> None:
        """Append a line to the journal; `step` counts optimizer steps."""
        with (self.folder / METRICS).open("a") as journal:
            journal.write(json.dumps({"step": step, **values}) + "\n")

    def cut_back(self) -> dict[str, int]:
        """Drop what the journal says of steps after the last checkpoint, which a resumed run takes again.

        Returns the last step that it told of each curve, nothing for a run that begins anew.
        """
        path = self.folder / METRICS
        if not path.is_file():
            return {}
        step = -1 if self.last_checkpoint is None else saved_step(self.last_checkpoint)
        # A line without its end was cut off with the process.
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        points = [json.loads(line) for line in lines]
        kept = (line for line, point in zip(lines, points, strict=True) if point["step"] <= step)
        write_whole(path, "".join(kept).encode())
        return {} if step < 0 else {key: point["step"] for point in points for key in point}

    def finish(self, facts: Values) -> None:
        """Write the file that means success, the last of a run."""
        write_whole(self.folder / FINAL, json.dumps(facts, indent=1).encode() + b"\n")


def open_run(values: Values, dataset: Dataset) -> Run:
    """The run that these values mean: an unfinished one of its name goes on, after finished ones comes `-2`, `-3`."""
    wanted = str(values["name"] or default_name(values, dataset))
    if Path(wanted).name != wanted:
        raise ValueError(f"name={wanted} is a path: runs=FOLDER says where runs lie, name=NAME only what one is called")
    name, number = wanted, 1
    runs = Path(str(values["runs"]))
    while (runs / name / FINAL).is_file():
        number += 1
        name = f"{wanted}-{number}"
    return Run(name, runs / name)


def default_name(values: Values, dataset: Dataset) -> str:
    """Model, data set and eight digits that stand for every value and every sample that changes what is computed."""
    meant = {key: value for key, value in values.items() if not key.startswith(NOT_IN_NAME)} | _digests(dataset)
    digest = hashlib.sha256(json.dumps(meant, sort_keys=True, default=str).encode()).hexdigest()
    return f"{values.get('model.variant', 'model')}-{dataset.name}-{digest[:8]}"


def fingerprint(values: Values, dataset: Dataset, *, global_batch_size: int, precision: str) -> dict[str, Any]:
    """All that decides what a run computes, by name: it goes on to the same bits where this is the same."""
    meant = {key: value for key, value in values.items() if not key.startswith(NOT_IN_FINGERPRINT)}
    found = {"global_batch_size": global_batch_size, "precision": precision}
    versions = {name: metadata.version(name) for name in ("torch", "nvidia-dali-cuda130")}
    return meant | _digests(dataset) | found | versions


def saved_step(checkpoint: Path) -> int:
    """The optimizer step of a checkpoint. Raises: ValueError when it cannot be read."""
    try:
        step: int = torch.load(checkpoint, mmap=True, weights_only=True)["global_step"]
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"{checkpoint} cannot be read ({why}): remove it to begin the run anew") from error
    return step


def _digests(dataset: Dataset) -> dict[str, str]:
    return {f"digest of {name}": split.digest for name, split in dataset.splits.items()}
