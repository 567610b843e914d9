"""A run's folder: its layout, its lock, and the run that a command means."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from data.loading.decoder import DecoderChoice
from data.locks import file_lock, is_file_locked
from data.shards.dataset import Dataset, write_atomically
from pipeline.build.parameters import with_digest
from pipeline.build.settings import Again, RunSettings
from pipeline.cli.console import is_main_process
from pipeline.runs.checkpoints import CheckpointFolder, FoundCheckpoint
from pipeline.runs.fingerprint import (
    Fingerprint,
    OtherSettingsError,
    check_unchanged,
    decoding_of,
    digests,
    recorded_decoder,
)
from pipeline.runs.journal import Journal
from pipeline.runs.status import read_process

NONFINITE = "nonfinite.json"  # in the folder: all samples of the step that diverged
NEW = "name=NAME or another out=FOLDER"
LOCK_SECONDS = 2.0  # other commands take the lock for a moment, to find out whether a process trains the run


class Run:
    """A run's folder, named after the run. The name stays the same when the same command is started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name
        self.config_file = folder / "config.yaml"  # as composed, with everything resolved
        self.fingerprint_file = folder / "fingerprint.json"
        self.journal = Journal(folder / "metrics.jsonl")
        self.checkpoints = CheckpointFolder(folder / "checkpoints")
        self.status_file = folder / "status.json"
        self.result_file = folder / "result.json"  # written last: it marks success
        self.initial_report = folder / "receptive_field"
        self.augmented_images = folder / "data" / "augmented.png"
        self.reports = folder / "reports"  # later ones
        self.evaluation = folder / "evaluation"  # a folder for each split
        self.calibration_file = self.evaluation / "calibration.json"
        self.export = folder / "export"
        self.tracking_id_file = folder / "mlflow_run_id"

    @property
    def own_files(self) -> set[str]:
        """Names of which at least one exists in the folder of a run that has begun."""
        begun = (self.config_file, self.checkpoints.path, self.status_file, self.journal.path, self.result_file)
        return {".lock", *(path.name for path in begun)}

    @property
    def tracking_id(self) -> str:
        """The run's id in MLflow, empty without a valid one."""
        text = self.tracking_id_file.read_bytes().strip() if self.tracking_id_file.is_file() else b""
        return text.decode() if re.fullmatch(rb"[\w-]+", text) else ""

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint, None before the first one."""
        return self.checkpoints.last

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint with the best evaluation, or the last one; None before the first."""
        return self.checkpoints.best or self.last_checkpoint

    @property
    def decoder(self) -> DecoderChoice | None:
        """The decoder of an unfinished run, None before its first checkpoint."""
        if self.last_checkpoint is None or not self.fingerprint_file.is_file():
            return None
        return recorded_decoder(self.fingerprint())

    @property
    def is_finished(self) -> bool:
        """Whether a training has succeeded in it."""
        return self.result_file.is_file()

    @property
    def is_locked(self) -> bool:
        """Whether a process trains it."""
        return is_file_locked(self.folder / ".lock")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder. Raises: ValueError when another process holds the lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(file_lock(self.folder / ".lock", seconds=LOCK_SECONDS))
            except TimeoutError as error:
                process = read_process(self.status_file) or "another process"
                raise ValueError(f"{self.folder} is locked by {process}: add {NEW} for a new run") from error
            yield

    def begin(self, fingerprint: Fingerprint, config: str) -> None:
        """Create the folder; write the fingerprint and the composed config, a YAML text."""
        self.checkpoints.path.mkdir(parents=True, exist_ok=True)
        (self.folder / NONFINITE).unlink(missing_ok=True)  # of a step that is taken again
        write_atomically(self.fingerprint_file, json.dumps(fingerprint, indent=1).encode() + b"\n")
        write_atomically(self.config_file, with_digest(config).encode())

    def check(self, fingerprint: Fingerprint) -> None:
        """Raise ValueError, naming the first difference, unless the run was started with this fingerprint."""
        if self.last_checkpoint is None:
            return
        path = self.fingerprint_file
        if not path.is_file():
            problem = f"{path} is missing, so the checkpoints cannot be matched with a config"
            raise OtherSettingsError(f"{problem}: add {NEW} for a new run, or again=replace")
        check_unchanged(self.fingerprint(), fingerprint, run=self.folder)

    def check_settings(self, fingerprint: Fingerprint) -> None:
        """Do the same for a fingerprint whose decoder is not chosen yet."""
        begun = self.last_checkpoint is not None and self.fingerprint_file.is_file()
        self.check({**fingerprint, **decoding_of(self.fingerprint() if begun else {})})

    def is_of(self, fingerprint: Fingerprint) -> bool:
        """Whether `check_settings` accepts it."""
        try:
            self.check_settings(fingerprint)
        except OtherSettingsError:
            return False
        return True

    def move_aside(self) -> Path:
        """Give the folder another name, and return that. Raises: ValueError when another process trains it."""
        names = (f"{self.name}-replaced-{number}" for number in count(1))
        folder = next(one for one in map(self.folder.with_name, names) if not one.exists())
        with self.locked():
            return self.folder.rename(folder)

    def newest_checkpoint(self) -> FoundCheckpoint:
        """Return the newest intact checkpoint. Raises: ValueError where all are damaged, or of an earlier version."""
        found, folder = self.checkpoints.newest(), self.checkpoints.path
        if found.checkpoint is None and found.damaged:
            raise ValueError(
                f"{'; '.join(found.damaged)}: no checkpoint is left; remove {folder} to start the run over"
            )
        if found.checkpoint is None and self.last_checkpoint is not None:
            raise ValueError(f"{self.last_checkpoint} has no manifest: remove {folder} to start the run over")
        return found

    def fingerprint(self) -> Fingerprint:
        """Read the fingerprint. Raises: ValueError where it is damaged."""
        try:
            found = json.loads(self.fingerprint_file.read_text())
            recorded_decoder(found)
            if "precision" not in found:
                raise KeyError("precision")
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise ValueError(f"{self.fingerprint_file} is damaged ({error}): train again with {NEW}") from error
        return dict(found)

    def result(self) -> dict[str, Any]:
        """Read the result of a finished run. Raises: ValueError where it is damaged."""
        try:
            return dict(json.loads(self.result_file.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.result_file} is damaged ({error}): remove it to finish the run again") from error

    def finish(self, result: Mapping[str, object]) -> None:
        """Write the file that marks success, the last one of a run."""
        write_atomically(self.result_file, json.dumps(result, indent=1).encode() + b"\n")


def open_run(settings: RunSettings, dataset: Dataset) -> Run:
    """Return the run of these settings; where nothing else is configured, `name-2` follows a finished one.

    Raises: ValueError for a name that is a path; FileExistsError for a run that must not exist, or for other files.
    """
    network = settings.network.rpartition(".")[2]  # without the location of a function that builds it
    name = candidate = settings.name or default_name(network, dataset, settings=settings.in_name)
    if name == ".." or Path(name).name != name:
        raise ValueError(f"name={name} is a path: runs=FOLDER sets the folder of all runs, name=NAME only names one")
    if settings.again is not None or settings.out is not None:
        run = Run(settings.out or settings.runs / name)
        present = {path.name for path in run.folder.iterdir()} if run.folder.is_dir() else set()
        if present and not present & run.own_files and is_main_process():  # rank 0 may be about to begin it
            raise FileExistsError(f"{run.folder} has files, but none of a run: empty it, or add {NEW}")
        refuses = settings.again == Again.REFUSE and is_main_process()  # others may come after it has begun the run
        if refuses and run.config_file.is_file():
            raise FileExistsError(f"{run.folder} has a run already, and again=refuse: remove it, or leave again out")
        return run
    number = 1
    while (run := Run(settings.runs / candidate)).is_finished:
        number += 1
        candidate = f"{name}-{number}"
    return run


def default_name(network: str, dataset: Dataset, *, settings: Mapping[str, object]) -> str:
    """Return network, data set and a hash of all settings and samples that decide the result.

    A change of this pattern orphans unfinished runs.
    """
    deciding = dict(settings) | digests(dataset)
    digest = hashlib.sha256(json.dumps(deciding, sort_keys=True, default=str).encode()).hexdigest()
    return f"{network}-{dataset.name}-{digest[:8]}"
