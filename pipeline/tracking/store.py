"""The database or server behind MLflow's address, opened with bounded waits; its failures are one line each."""

from __future__ import annotations

import logging
import os
import re
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from data.locks import file_lock
from pipeline.cli.environment import is_server
from pipeline.cli.errors import ERRNO
from pipeline.cli.secrets import mask_address

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
LOCAL_SERVER = "http://127.0.0.1:5000"  # of `make ui`
MESSAGE_LENGTH = 160  # characters of an error's first line
CAUSE = re.compile(rf"{ERRNO.pattern}(\w[\w ]+)")
LOCK_SECONDS = 30.0  # for which processes that create one SQLite store wait for each other
# With MLflow's defaults one call to a dead server takes four minutes. A single try that times out after 10 s is enough,
# because the mirror tries again. Variables that are set win.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}


class Store:
    """A SQLite file in the working folder by default, any server or database by `uri` or MLFLOW_TRACKING_URI."""

    def __init__(self, uri: str | None = None, *, experiment: str = "convoy") -> None:
        default = f"sqlite:///{Path(DATABASE).resolve()}"
        chosen = os.environ.get("MLFLOW_TRACKING_URI") or default
        self.uri = uri or chosen
        self.is_given = self.uri != chosen  # by the config
        self.is_default, self.is_server = self.uri == default, is_server(self.uri)
        self.file = Path(self.uri.removeprefix("sqlite:///")) if self.uri.startswith("sqlite:///") else None
        self._experiment = experiment
        self._opened: tuple[MlflowClient, str] | None = None

    @property
    def printed_address(self) -> str:
        """The address as it may be printed, stored and linked to. Every address passes here."""
        return mask_address(self.uri)

    @staticmethod
    def load() -> None:
        """Import MLflow without telemetry, with bounded requests and without its log lines."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import mlflow  # noqa: F401  # a second of imports, which callers time apart from the server

        for logger in ("mlflow", "alembic"):
            logging.getLogger(logger).setLevel(logging.CRITICAL)

    def open(self) -> tuple[MlflowClient, str]:
        """Return a client and the id of the experiment, which is created if missing; any exception is a failure."""
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> tuple[MlflowClient, str]:
        self.load()
        from mlflow import MlflowClient

        # Processes that create one SQLite store at the same time all fail, so they take turns.
        name = None if self.file is None else self.file.with_name(f".{self.file.name}.lock")
        with nullcontext() if name is None else file_lock(name, seconds=LOCK_SECONDS):
            if self.file is not None and not self.file.exists():
                # MLflow cannot open a database that a kill or a full disk has left half created.
                partial = self.file.with_name(f".{self.file.name}.new")
                for end in ("", "-journal", "-wal", "-shm"):
                    partial.with_name(partial.name + end).unlink(missing_ok=True)
                MlflowClient(f"sqlite:///{partial}").get_experiment_by_name(self._experiment)
                partial.replace(self.file)
            client = MlflowClient(self.uri)
            experiment = client.get_experiment_by_name(self._experiment)
            if experiment is not None:
                return client, str(experiment.experiment_id)
            artifacts = None if self.file is None else self.file.resolve().with_name(ARTIFACTS).as_uri()
            return client, str(client.create_experiment(self._experiment, artifact_location=artifacts))

    def link(self, experiment_id: str, run_id: str) -> str:
        """Return the address of a run's page, that of `make ui` for a local database."""
        server = self.printed_address.rstrip("/") if self.is_server else LOCAL_SERVER
        return f"{server}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"

    def reason(self, error: BaseException) -> str:
        """Return the first line of an error, shortened, with the printed address; of a connection, its cause."""
        if self.is_server and (cause := CAUSE.search(str(error))):
            return cause[1]
        line = " ".join(str(error).strip().partition("\n")[0].split()) or type(error).__name__
        line = mask_address(line.replace(self.uri, self.printed_address))
        return line if len(line) <= MESSAGE_LENGTH else f"{line[:MESSAGE_LENGTH]}..."

    def failure(self, error: BaseException) -> str:
        """Return a line about a failed call."""
        return f"MLflow at {self.printed_address} failed: {self.reason(error)}"
