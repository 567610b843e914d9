"""A run in MLflow, through a queue, so that a slow or dead server neither slows nor ends a training."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from pipeline.runs.run import Run
from pipeline.tracking.background_queue import BackgroundQueue, first_line
from pipeline.tracking.tracker import Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
LOCAL_SERVER = "http://127.0.0.1:5000"  # of `make ui`
MAX_PARAMETER_LENGTH = 6000  # characters that MLflow stores
PARAMETERS_PER_REQUEST = 100
FINAL_WAIT_SECONDS = {True: 60.0, False: 5.0}  # for queued messages, by whether the run succeeded
# With MLflow's defaults one call to a dead server takes four minutes.
REQUEST_LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}


def store_errors() -> tuple[type[Exception], ...]:
    """Return the errors of a server or a database that does not answer, or is none."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError


class MLflowTracker(Tracker):
    """A run in MLflow: a SQLite file in the working folder by default, any server by `uri` or MLFLOW_TRACKING_URI."""

    def __init__(self, *, uri: str | None = None, experiment: str = "convoy") -> None:
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(DATABASE).resolve()}"
        self.experiment = experiment
        if not self.uri.startswith("http"):
            is_default = self.uri == f"sqlite:///{Path(DATABASE).resolve()}"
            self.command = "make ui" if is_default else f"mlflow ui --backend-store-uri {self.uri}"
        self._run_id: str | None = None
        self._logged: Mapping[str, int] = {}
        self._queue: BackgroundQueue | None = None

    def start(self, run: Run, parameters: Mapping[str, object], *, logged: Mapping[str, int]) -> str | None:
        """Create the run, or continue the one whose id is in the run's folder; without a server nothing is sent."""
        self._logged = logged
        return self._answer_of(lambda: self._start(run, parameters), "does not accept the run")

    def attach(self, run: Run) -> str | None:
        """Open the run whose id is in the run's folder; its status stays."""
        store, run_id = self._store_file, run.tracking_id
        if not run_id:
            return f"{run.folder} has no run in MLflow"
        if store is not None and not store.is_file():
            return f"there is no {store}"

        def open_run() -> None:
            from mlflow import MlflowClient

            logging.getLogger("mlflow").setLevel(logging.WARNING)
            self._client = MlflowClient(self.uri)
            self._client.get_run(run_id)
            self._run_id = run_id

        return self._answer_of(open_run, f"does not show the run {run_id}")

    def detach(self) -> str | None:
        """Wait for the queue, a minute at most."""
        return self._queue.finish(FINAL_WAIT_SECONDS[True]) if self._queue else None

    def _answer_of(self, task: Callable[[], None], problem: str) -> str | None:
        """Make a queue and do a task; return why the server refused it."""
        self.prepare_environment()
        expected = store_errors()
        self._queue = BackgroundQueue(*expected, ImportError)  # artifact stores may lack their library
        try:
            task()
        except expected as error:
            return f"{self.uri} {problem}: {first_line(error)}"
        return None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send all values as one batch, without the points that a resumed run repeats."""
        from mlflow.entities import Metric

        new = {key: value for key, value in values.items() if step > self._logged.get(key, -1)}
        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, step) for key, value in new.items()]
        self._send(lambda run_id: self._client.log_batch(run_id, metrics=metrics))

    def log_file(self, path: Path, folder: str) -> None:
        """Copy a file to the run's artifacts."""
        self._send(lambda run_id: self._client.log_artifact(run_id, str(path), folder))

    def log_table(self, table: Mapping[str, list[object]], file: str) -> None:
        """Store a table so that the dashboard shows it as one."""
        self._send(lambda run_id: self._client.log_table(run_id, dict(table), file))

    def finish(self, *, succeeded: bool) -> str | None:
        """Mark the run FINISHED or FAILED, and wait for the queue, a minute at most."""
        self._send(lambda run_id: self._client.set_terminated(run_id, "FINISHED" if succeeded else "FAILED"))
        return self._queue.finish(FINAL_WAIT_SECONDS[succeeded]) if self._queue else None

    def _send(self, task: Callable[[str], object]) -> None:
        run_id = self._run_id
        if run_id is not None and self._queue is not None:
            self._queue.put(lambda: task(run_id))

    def _start(self, run: Run, parameters: Mapping[str, object]) -> None:
        self._client, experiment_id = self.open_store()
        id_file = run.tracking_id_file
        if id_file.is_file() and self._logged:
            run_id = id_file.read_text().strip()
            self._client.update_run(run_id, status="RUNNING")
        else:
            run_id = str(self._client.create_run(experiment_id, run_name=run.name).info.run_id)
            self._log_parameters(run_id, parameters)
            id_file.write_text(run_id + "\n")
        self._run_id = run_id
        server = self.uri.rstrip("/") if self.uri.startswith("http") else LOCAL_SERVER
        self.link = f"{server}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"

    @property
    def _store_file(self) -> Path | None:
        return Path(self.uri.removeprefix("sqlite:///")) if self.uri.startswith("sqlite:///") else None

    @staticmethod
    def prepare_environment() -> None:
        """Switch telemetry off and limit the time of requests, which MLflow reads when it is imported."""
        for name, value in {"MLFLOW_DISABLE_TELEMETRY": "true", **REQUEST_LIMITS}.items():
            os.environ.setdefault(name, value)

    def open_store(self) -> tuple[MlflowClient, str]:
        """Return a client and the id of the experiment, which is created if missing. Raises: MlflowException."""
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        store = self._store_file
        # Processes that create one SQLite store at the same time all fail, so they take turns.
        with nullcontext() if store is None else FileLock(store.with_name(f".{store.name}.lock"), timeout=30):
            client = MlflowClient(self.uri)
            experiment = client.get_experiment_by_name(self.experiment)
            if experiment is not None:
                return client, str(experiment.experiment_id)
            artifacts = None if store is None else store.resolve().with_name(ARTIFACTS).as_uri()
            return client, str(client.create_experiment(self.experiment, artifact_location=artifacts))

    def _log_parameters(self, run_id: str, parameters: Mapping[str, object]) -> None:
        from mlflow.entities import Param

        # As typed on the command line: null, true, 0.1, [0.08, 1.0].
        words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in parameters.items()}
        params = [Param(key, value[:MAX_PARAMETER_LENGTH]) for key, value in words.items()]
        for start in range(0, len(params), PARAMETERS_PER_REQUEST):
            self._client.log_batch(run_id, params=params[start : start + PARAMETERS_PER_REQUEST])
