"""A run's folder: its layout, its lock, and the run that a command means."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from data.shards.dataset import Dataset, write_atomically
from pipeline.build.settings import RunSettings
from pipeline.runs.fingerprint import Fingerprint, check_unchanged, digests
from pipeline.runs.journal import Journal

CONFIG, FINGERPRINT, METRICS, RESULT = "config.yaml", "fingerprint.json", "metrics.jsonl", "result.json"
CHECKPOINTS, BEST, LAST = "checkpoints", "best.ckpt", "last.ckpt"
RECEPTIVE_FIELD = "receptive_field"  # the report at the start, in the run's folder and among its artifacts
REPORTS = "reports"  # later ones
TRACKING_ID = "mlflow_run_id"


@dataclass(frozen=True)
class Run:
    """A run's folder. The name stays the same when the same command is started again."""

    name: str
    folder: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / CHECKPOINTS

    @property
    def last_checkpoint(self) -> Path | None:
        """The checkpoint from which an unfinished run continues, None before the first one."""
        path = self.checkpoints / LAST
        return path if path.is_file() else None

    @property
    def journal(self) -> Journal:
        """The metrics of the run."""
        return Journal(self.folder / METRICS)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder. Raises: ValueError when another process holds the lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(f"{self.folder} is locked by a running process: add name=NAME for a new run") from error
        try:
            yield
        finally:
            lock.release()

    def begin(self, fingerprint: Fingerprint, config: str) -> None:
        """Create the folder; write the fingerprint and the composed config, a YAML text."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / FINGERPRINT, json.dumps(fingerprint, indent=1).encode() + b"\n")
        write_atomically(self.folder / CONFIG, config.encode())

    def check(self, fingerprint: Fingerprint) -> None:
        """Raise ValueError, naming the first difference, unless the run was started with this fingerprint."""
        if self.last_checkpoint is None:
            return
        path = self.folder / FINGERPRINT
        if not path.is_file():
            raise ValueError(f"{path} is missing, so the checkpoints cannot be matched with a config: add name=NAME")
        check_unchanged(json.loads(path.read_text()), fingerprint, run=self.folder)

    def finish(self, result: Mapping[str, object]) -> None:
        """Write the file that marks success, the last one of a run."""
        write_atomically(self.folder / RESULT, json.dumps(result, indent=1).encode() + b"\n")


def open_run(settings: RunSettings, dataset: Dataset) -> Run:
    """Return the unfinished run of these settings; after finished ones `name-2`, `name-3` follow.

    Raises: ValueError for a name that is a path.
    """
    network = settings.network.rpartition(".")[2]  # without the location of a function that builds it
    name = candidate = settings.name or default_name(network, dataset, settings=settings.in_name)
    if name == ".." or Path(name).name != name:
        raise ValueError(f"name={name} is a path: runs=FOLDER sets the folder of all runs, name=NAME only names one")
    number = 1
    while (settings.runs / candidate / RESULT).is_file():
        number += 1
        candidate = f"{name}-{number}"
    return Run(candidate, settings.runs / candidate)


def default_name(network: str, dataset: Dataset, *, settings: Mapping[str, object]) -> str:
    """Return network, data set and a hash of all settings and samples that decide the result.

    A change of this pattern orphans unfinished runs.
    """
    deciding = dict(settings) | digests(dataset)
    digest = hashlib.sha256(json.dumps(deciding, sort_keys=True, default=str).encode()).hexdigest()
    return f"{network}-{dataset.name}-{digest[:8]}"
