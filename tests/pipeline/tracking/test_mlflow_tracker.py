"""MLflow as it is, dead servers and several processes at once included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.runs.run import Run
from pipeline.tracking.mlflow_tracker import MLflowTracker
from tests.support.paths import ROOT

START = """
from pathlib import Path
import sys
from pipeline.runs.run import Run
from pipeline.tracking.mlflow_tracker import MLflowTracker
folder = Path(sys.argv[1])
folder.mkdir()
tracker = MLflowTracker()
assert tracker.start(Run(folder), {"seed": 0, "data.index": None}, logged={}) is None
tracker.log({"train/loss": 1.0}, 5)
assert tracker.finish(succeeded=True) is None
"""


def test_several_processes_create_one_store(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", START, str(tmp_path / name)], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
        )
        for name in ("a", "b", "c")
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("convoy")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["a", "b", "c"]
    for run in runs:
        assert run.info.status == "FINISHED"
        assert run.data.params == {"seed": "0", "data.index": "null"}
        assert [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "train/loss")] == [
            (5, 1)
        ]


def test_a_resumed_run_logs_only_new_points(tmp_path: Path) -> None:
    uri, run = f"sqlite:///{tmp_path / 'mlflow.db'}", Run(tmp_path)
    for logged in ({}, {"step": 5, "train/loss": 5}):  # as if it had been killed in the evaluation after step 5
        tracker = MLflowTracker(uri=uri)
        assert tracker.start(run, {}, logged=logged) is None
        tracker.log({"train/loss": 1.0}, 5)
        if logged:
            tracker.log({"val/top1": 0.5}, 5)
        assert tracker.finish(succeeded=True) is None
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("convoy")
    assert experiment is not None
    (tracked,) = client.search_runs([experiment.experiment_id])
    for key in ("train/loss", "val/top1"):
        assert [point.step for point in client.get_metric_history(tracked.info.run_id, key)] == [5]


def test_a_dead_server_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = MLflowTracker(uri="http://127.0.0.1:9")
    why = tracker.start(Run(tmp_path), {}, logged={})
    assert why is not None
    assert why.startswith("http://127.0.0.1:9 does not accept the run")
    assert tracker.link is None
    tracker.log({"train/loss": 1.0}, 5)
    tracker.log_file(tmp_path / "config.yaml", "config")
    assert tracker.finish(succeeded=True) is None  # start has reported it


def test_a_file_that_is_no_database_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database, whatever its name")
    run = Run(tmp_path / "runs" / "mine")
    run.folder.mkdir(parents=True)
    run.tracking_id_file.write_text("0123")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    problem = MLflowTracker(uri=uri).attach(run)
    assert problem is not None
    assert problem.startswith(f"{uri} does not show the run 0123: ")
