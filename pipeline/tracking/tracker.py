"""MLflow, and nothing: what a run tells the dashboard. The only file that imports mlflow.

The run's journal is the truth; the dashboard follows it on a thread of its own, so
that a slow or dead server neither slows nor ends a training.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import TYPE_CHECKING, Protocol

from filelock import FileLock

from pipeline.runs.run import Run

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"
SERVED = "http://127.0.0.1:5000"  # by `make ui`
RUN_ID = "mlflow_run_id"
LONGEST_VALUE = 6000  # characters of a parameter that MLflow keeps
PARAMETERS_AT_ONCE = 100
WAITING = 10_000  # points that may wait for a slow server
LAST_SECONDS = {True: 60.0, False: 5.0}  # that the end of a run waits for it, whether it has succeeded or been stopped
# MLflow's own settings let one call to a dead server take four minutes.
IMPATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}


def as_override(value: object) -> str:
    """A value as it is typed on the command line: null, true, 0.1, [0.08, 1.0]; a string as it is."""
    return value if isinstance(value, str) else json.dumps(value)


class Tracker(Protocol):
    """Where a run is shown while it goes on; nothing it does may slow or end the run."""

    @property
    def link(self) -> str | None:
        """Address of the run's page and how to open it, None where there is none."""

    def start(self, run: Run, parameters: Mapping[str, object], *, reached: Mapping[str, int]) -> str | None:
        """Begin a run, or go on with one that has told of each curve up to the step in `reached`; parameters by
        dotted key. Return why it cannot, None when it can."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each curve; `step` counts optimizer steps."""

    def keep(self, path: Path, folder: str) -> None:
        """Keep a file with the run's artifacts."""

    def tabulate(self, table: Mapping[str, list[object]], file: str) -> None:
        """Keep a table, by column, as an artifact of this name that ends in .json."""

    def finish(self, *, succeeded: bool) -> str | None:
        """End the run; return what did not arrive and why, None when all did."""


class NoTracker:
    """Tracks nothing."""

    link = None

    def start(self, run: Run, parameters: Mapping[str, object], *, reached: Mapping[str, int]) -> str | None:
        """Nothing is wrong."""
        return None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def keep(self, path: Path, folder: str) -> None:
        """Nothing."""

    def tabulate(self, table: Mapping[str, list[object]], file: str) -> None:
        """Nothing."""

    def finish(self, *, succeeded: bool) -> str | None:
        """Nothing is missing."""
        return None


class MLflowTracker:
    """A run in MLflow: a SQLite file in the working folder by default, any server by `uri` or MLFLOW_TRACKING_URI."""

    def __init__(self, *, uri: str | None = None, experiment: str = "convoy") -> None:
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(DATABASE).resolve()}"
        self.experiment = experiment
        self.link: str | None = None
        self._run_id: str | None = None
        self._reached: Mapping[str, int] = {}
        self._sender = Sender()

    def start(self, run: Run, parameters: Mapping[str, object], *, reached: Mapping[str, int]) -> str | None:
        """Create the run, or go on with the one whose id the run's folder holds; do without where no server answers."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read by the import
        for name, value in IMPATIENCE.items():
            os.environ.setdefault(name, value)
        from mlflow.exceptions import MlflowException

        self._reached = reached
        try:
            self._start(run, parameters)
        except (MlflowException, OSError) as error:
            return f"{self.uri} does not take the run: {_first_line(error)}"
        return None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send all values as one batch."""
        from mlflow.entities import Metric

        # A resumed run takes steps again, to the same values.
        values = {key: value for key, value in values.items() if step > self._reached.get(key, -1)}
        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, step) for key, value in values.items()]
        self._send(lambda run_id: self._client.log_batch(run_id, metrics=metrics))

    def keep(self, path: Path, folder: str) -> None:
        """Copy a file to the run's artifacts."""
        self._send(lambda run_id: self._client.log_artifact(run_id, str(path), folder))

    def tabulate(self, table: Mapping[str, list[object]], file: str) -> None:
        """Keep it where the dashboard shows tables as such."""
        self._send(lambda run_id: self._client.log_table(run_id, dict(table), file))

    def finish(self, *, succeeded: bool) -> str | None:
        """Mark the run FINISHED or FAILED, and wait for what is on its way, a minute at most."""
        self._send(lambda run_id: self._client.set_terminated(run_id, "FINISHED" if succeeded else "FAILED"))
        return self._sender.finish(LAST_SECONDS[succeeded])

    def _send(self, task: Callable[[str], object]) -> None:
        run_id = self._run_id
        if run_id is not None:
            self._sender.send(lambda: task(run_id))

    def _start(self, run: Run, parameters: Mapping[str, object]) -> None:
        self._client, experiment_id = self._open()
        id_file = run.folder / RUN_ID
        if id_file.is_file() and self._reached:
            run_id = id_file.read_text().strip()
            self._client.update_run(run_id, status="RUNNING")
        else:
            run_id = str(self._client.create_run(experiment_id, run_name=run.name).info.run_id)
            self._log_parameters(run_id, parameters)
            id_file.write_text(run_id + "\n")
        self._run_id = run_id
        self.link = self._link(f"#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning")

    def _link(self, page: str) -> str:
        if self.uri.startswith("http"):
            return f"{self.uri.rstrip('/')}/{page}"
        default = self.uri == f"sqlite:///{Path(DATABASE).resolve()}"
        return f"{SERVED}/{page} ({'make ui' if default else f'mlflow ui --backend-store-uri {self.uri}'})"

    def _open(self) -> tuple[MlflowClient, str]:
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        store = Path(self.uri.removeprefix("sqlite:///")) if self.uri.startswith("sqlite:///") else None
        # Processes that open a fresh SQLite store at once all die: one at a time makes it.
        with nullcontext() if store is None else FileLock(store.with_name(f".{store.name}.lock")):
            client = MlflowClient(self.uri)
            known = client.get_experiment_by_name(self.experiment)
            if known is not None:
                return client, str(known.experiment_id)
            artifacts = None if store is None else store.resolve().with_name(ARTIFACTS).as_uri()
            return client, str(client.create_experiment(self.experiment, artifact_location=artifacts))

    def _log_parameters(self, run_id: str, parameters: Mapping[str, object]) -> None:
        from mlflow.entities import Param

        params = [Param(key, as_override(value)[:LONGEST_VALUE]) for key, value in parameters.items()]
        for start in range(0, len(params), PARAMETERS_AT_ONCE):
            self._client.log_batch(run_id, params=params[start : start + PARAMETERS_AT_ONCE])


class Sender:
    """Does what it is given, in order, on a thread of its own; what fails or finds no place is counted as lost."""

    def __init__(self) -> None:
        self.failure: str | None = None  # the latest
        self.lost = 0
        self._tasks: Queue[Callable[[], object] | None] = Queue(WAITING)
        self._thread: Thread | None = None

    def send(self, task: Callable[[], object]) -> None:
        """Add a task; returns at once."""
        if self._thread is None:
            self._thread = Thread(target=self._run, name="mlflow", daemon=True)
            self._thread.start()
        try:
            self._tasks.put_nowait(task)
        except Full:
            self.lost += 1

    def finish(self, seconds: float) -> str | None:
        """Wait so long for what is on its way; return what is missing and why, None when nothing is."""
        if self._thread is not None:
            deadline = time.monotonic() + seconds
            with suppress(Full):
                self._tasks.put(None, timeout=seconds)
            self._thread.join(max(0.0, deadline - time.monotonic()))
            self.lost += self._tasks.qsize()
        if self.failure is None and not self.lost:
            return None
        return f"the dashboard lacks {self.lost} messages: {self.failure or 'the server is too slow'}"

    def _run(self) -> None:
        from mlflow.exceptions import MlflowException

        while (task := self._tasks.get()) is not None:
            try:
                task()
            except (MlflowException, OSError, ImportError) as error:  # an artifact store may need its own library
                self.failure, self.lost = _first_line(error), self.lost + 1


def _first_line(error: Exception) -> str:
    line = str(error).partition("\n")[0]
    return line if len(line) <= 160 else f"{line[:160]}..."
