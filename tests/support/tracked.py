"""Small runs without a training, their pages in MLflow, and servers that do not answer as they should."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

from mlflow import MlflowClient
from mlflow.entities import Run as MLflowRun

from pipeline.runs.run import Run
from tests.support.processes import free_port

CONFIG = "model:\n  num_classes: 10\ndata:\n  root: PATH\nseed: {seed}\ntracking:\n  _target_: {target}\n"
MLFLOW = "pipeline.tracking.mlflow_tracker.MLflowTracker"


def make_run(folder: Path, *, steps: Sequence[int] = (10, 20, 30), seed: int = 0, target: str = MLFLOW) -> Run:
    """Write the folder of a run that nobody trains any more: its config, and a journal with two curves."""
    run = Run(folder)
    folder.mkdir(parents=True)
    run.config_file.write_text(CONFIG.format(seed=seed, target=target))
    run.journal.record({"params_millions": 1.5}, 0)
    record_steps(run, steps)
    return run


def record_steps(run: Run, steps: Sequence[int]) -> None:
    """Append a point of each curve at some steps."""
    for step in steps:
        run.journal.record({"train/loss": 1 / step, "train/lr": 0.1}, step)


def write_evaluation(run: Run, name: str, *, top1: float) -> None:
    """Write the files of an evaluation."""
    folder = run.evaluation / name
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {"metrics": {"top1": top1, "f1": None}, "calibration": {"expected_calibration_error": 0.25}}
    (folder / "index.html").write_text(f"top1 {top1}")
    (folder / "evaluation.json").write_text(json.dumps(numbers))


def journal_points(run: Run) -> dict[str, list[tuple[int, float]]]:
    """Read the points of each curve from the lines of the file."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in run.journal.path.read_text().splitlines():
        fields = json.loads(line)
        for key in fields.keys() - {"step", "time", "crc"}:
            curves.setdefault(key, []).append((fields["step"], math.nan if fields[key] is None else fields[key]))
    return curves


def pages(uri: str, experiment: str = "convoy") -> list[MLflowRun]:
    """Return all pages of an experiment, none without one."""
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    return [] if found is None else list(client.search_runs([found.experiment_id], order_by=["start_time ASC"]))


def page_points(uri: str, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Return the points of each curve of a page by step, repeated ones too."""
    client = MlflowClient(uri)
    curves = client.get_run(run_id).data.metrics
    return {key: sorted((one.step, one.value) for one in client.get_metric_history(run_id, key)) for key in curves}


def page_files(uri: str, run_id: str, folder: str | None = None) -> list[str]:
    """Return the paths of a page's artifacts."""
    files = []
    for artifact in MlflowClient(uri).list_artifacts(run_id, folder):
        files += page_files(uri, run_id, artifact.path) if artifact.is_dir else [artifact.path]
    return sorted(files)


@contextmanager
def answering(answer: bytes | None) -> Iterator[str]:
    """Serve an address that answers each request with these bytes and hangs up, or, for None, never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(50)
        silent: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:  # closed
                    return
                if answer is None:
                    silent.append(connection)
                    continue
                connection.recv(65536)
                connection.sendall(answer)
                connection.close()

        Thread(target=serve, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            for connection in silent:
                connection.close()


class Server:
    """A real `mlflow server` with a SQLite database, which can hang, continue, die and return."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri, self.database = f"http://127.0.0.1:{self.port}", f"sqlite:///{folder / 'server.db'}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and return when it answers."""
        words = ["--backend-store-uri", self.database, "--artifacts-destination", str(self.folder / "artifacts")]
        address = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command = [sys.executable, "-m", "mlflow", "server", *words, *address]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        log = (self.folder / "server.log").open("ab")
        with log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while self._process.poll() is None:
            try:
                direct.open(f"{self.uri}/health", timeout=5).close()
            except (urllib.error.URLError, OSError):
                continue
            return
        raise AssertionError((self.folder / "server.log").read_text())

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all its processes."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """End it at once, if it runs."""
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait(timeout=30)
            self._process = None
