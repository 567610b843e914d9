"""MLflow, and nothing: what a run tells the dashboard. The only file that imports mlflow."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from filelock import FileLock

from pipeline.journal import Run

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"
RUN_ID = "mlflow_run_id"
LONGEST_VALUE = 6000  # characters of a parameter that MLflow keeps
PARAMETERS_AT_ONCE = 100


def as_override(value: object) -> str:
    """A value as it is typed on the command line: null, true, 0.1, [0.08, 1.0]; a string as it is."""
    return value if isinstance(value, str) else json.dumps(value)


class Tracker(Protocol):
    """Where a run is shown while it goes on."""

    @property
    def link(self) -> str | None:
        """Address of the run's page, None where there is none."""

    def start(self, run: Run, parameters: Mapping[str, object]) -> None:
        """Begin, or go on with a run begun before; parameters by dotted key."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """A point of each curve; `step` counts optimizer steps, 0 for facts."""

    def keep(self, path: Path, folder: str) -> None:
        """Keep a file in a folder of the run's artifacts."""

    def finish(self, *, succeeded: bool) -> None:
        """End the run."""


class NoTracker:
    """Tracks nothing."""

    link = None

    def start(self, run: Run, parameters: Mapping[str, object]) -> None:
        """Nothing."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def keep(self, path: Path, folder: str) -> None:
        """Nothing."""

    def finish(self, *, succeeded: bool) -> None:
        """Nothing."""


class MLflowTracker:
    """A run in MLflow: a SQLite file in the working folder by default, any server by `uri` or MLFLOW_TRACKING_URI."""

    def __init__(self, *, uri: str | None = None, experiment: str = "convoy") -> None:
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(DATABASE).resolve()}"
        self.experiment = experiment
        self.link: str | None = None

    def start(self, run: Run, parameters: Mapping[str, object]) -> None:
        """Create the run, or go on with the one whose id the run's folder holds."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self._client, experiment_id = self._open()
        id_file = run.folder / RUN_ID
        if id_file.is_file():
            self._run_id = id_file.read_text().strip()
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            created = self._client.create_run(experiment_id, run_name=run.name)
            self._run_id = str(created.info.run_id)
            id_file.write_text(self._run_id + "\n")
            self._log_parameters(parameters)
        page = f"#/experiments/{experiment_id}/runs/{self._run_id}?workflowType=machine_learning"
        server = self.uri if self.uri.startswith("http") else "http://127.0.0.1:5000"
        self.link = f"{server}/{page}"

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log all values as one batch."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run_id, metrics=[Metric(key, value, now, step) for key, value in values.items()])

    def keep(self, path: Path, folder: str) -> None:
        """Copy a file to the run's artifacts."""
        self._client.log_artifact(self._run_id, str(path), folder)

    def finish(self, *, succeeded: bool) -> None:
        """Mark the run FINISHED or FAILED."""
        self._client.set_terminated(self._run_id, "FINISHED" if succeeded else "FAILED")

    def _open(self) -> tuple[MlflowClient, str]:
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        # Processes that open a fresh SQLite store at once all die: one at a time makes it.
        with FileLock(Path(f".{DATABASE}.lock")):
            client = MlflowClient(self.uri)
            known = client.get_experiment_by_name(self.experiment)
            if known is not None:
                return client, str(known.experiment_id)
            artifacts = None if self.uri.startswith("http") else Path(ARTIFACTS).resolve().as_uri()
            return client, str(client.create_experiment(self.experiment, artifact_location=artifacts))

    def _log_parameters(self, parameters: Mapping[str, object]) -> None:
        from mlflow.entities import Param

        params = [Param(key, as_override(value)[:LONGEST_VALUE]) for key, value in parameters.items()]
        for start in range(0, len(params), PARAMETERS_AT_ONCE):
            self._client.log_batch(self._run_id, params=params[start : start + PARAMETERS_AT_ONCE])
