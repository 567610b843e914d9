"""A mirror in real SQLite stores: what a page has after resumes, restarts, failures and evaluations."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.runs.run import Run
from pipeline.tracking.contents import parameters_of
from pipeline.tracking.mlflow_tracker import MLflowTracker
from pipeline.tracking.tracker import State, Tracker
from tests.support.paths import ROOT
from tests.support.tracked import (
    journal_points,
    make_run,
    page_files,
    page_points,
    pages,
    record_steps,
    write_evaluation,
)  # fmt: skip

OPEN = "from pipeline.tracking.store import Store; Store().open()"


def mirror(local_uri: str, run: Run, *, steps: tuple[int, ...] = (), state: State = "finished") -> str | None:
    """Make the calls to a tracker of a training that continues a run for some steps."""
    tracker = MLflowTracker(uri=local_uri)
    with run.locked():
        assert tracker.start(run, parameters_of(run)) is None
        record_steps(run, steps)
        tracker.update()
        return tracker.finish(state)


@pytest.mark.faults
def test_several_processes_create_one_store(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OPEN]
    processes = [subprocess.Popen(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    experiments = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").search_experiments()
    assert sorted(one.name for one in experiments) == ["Default", "convoy"]


@pytest.mark.parametrize(("state", "status"), [("finished", "FINISHED"), ("stopped", "KILLED"), ("failed", "FAILED")])
def test_a_page_has_every_point_with_the_time_of_its_line(
    tmp_path: Path, local_uri: str, state: State, status: str
) -> None:
    run = make_run(tmp_path / "runs" / "mine")
    run.journal.record({"val/loss": math.nan}, 30)
    assert mirror(local_uri, run, steps=tuple(range(40, 4000, 2)), state=state) is None  # several requests
    (page,) = pages(local_uri)
    assert (page.info.status, page.info.run_name, page.info.run_id) == (status, "mine", run.tracking_id)
    assert page.data.params["model.num_classes"] == "10"
    found, expected = page_points(local_uri, run.tracking_id), journal_points(run)
    assert math.isnan(found.pop("val/loss")[0][1])
    assert expected.pop("val/loss")[0][0] == 30
    assert len(expected["train/loss"]) == 1983
    assert found == expected
    times = [point.timestamp for point in MlflowClient(local_uri).get_metric_history(run.tracking_id, "train/lr")]
    assert times == [round(1000 * point.time) for point in run.journal.points() if "train/lr" in point.values]


def test_a_resumed_run_sends_only_what_the_page_lacks(tmp_path: Path, local_uri: str) -> None:
    run = make_run(tmp_path / "runs" / "mine")
    mirror(local_uri, run, steps=(40, 50), state="stopped")
    run.journal.truncate_after(20)
    record_steps(run, (30,))
    run.journal.record({"val/top1": 0.5}, 30)
    tracker = MLflowTracker(uri=local_uri)
    with run.locked():
        assert tracker.start(run, {}) is None
        assert pages(local_uri)[0].info.status == "RUNNING"
        record_steps(run, (40, 50, 60))
        assert tracker.finish("finished") is None
    (page,) = pages(local_uri)
    assert page.info.status == "FINISHED"
    assert page_points(local_uri, page.info.run_id) == journal_points(run)


def test_a_run_that_starts_over_with_other_parameters_gets_another_page(tmp_path: Path, local_uri: str) -> None:
    run = make_run(tmp_path / "runs" / "mine")
    mirror(local_uri, run, state="stopped")
    for seed, count in (("0", 1), ("1", 2), ("1", 2)):
        run.journal.truncate_after(-1)
        run.config_file.write_text(run.config_file.read_text().replace("seed: 0", f"seed: {seed}"))
        mirror(local_uri, run, steps=(10, 20), state="stopped")
        assert len(pages(local_uri)) == count
    assert [page.info.status for page in pages(local_uri)] == ["KILLED", "KILLED"]
    assert [page.data.params["seed"] for page in pages(local_uri)] == ["0", "1"]
    assert run.tracking_id == pages(local_uri)[1].info.run_id
    assert page_points(local_uri, run.tracking_id) == journal_points(run)


def test_files_are_sent_when_they_change_or_are_lost(tmp_path: Path, local_uri: str) -> None:
    run = make_run(tmp_path / "runs" / "mine")
    write_evaluation(run, "val", top1=0.5)
    (run.evaluation / "unfinished").mkdir()
    (run.evaluation / "unfinished" / "index.html").touch()
    run.initial_report.mkdir()
    (run.initial_report / "layers.json").write_text('{"columns": ["a"], "data": [[1]]}')
    sent = MLflowTracker(uri=local_uri).send(run)
    expected = [
        "config/config.yaml", "evaluation/val/evaluation.json", "evaluation/val/index.html",
        "receptive_field/layers.json",
    ]  # fmt: skip
    assert (sent.num_files, sent.problem) == (4, None)
    assert page_files(local_uri, run.tracking_id) == expected
    assert MLflowTracker(uri=local_uri).send(run) == (0, 0, None, True)
    write_evaluation(run, "val", top1=0.6)  # of the same lengths
    sent = MLflowTracker(uri=local_uri).send(run)
    assert sent.num_files == 2
    artifacts = Path(pages(local_uri)[0].info.artifact_uri.removeprefix("file://"))
    assert (artifacts / "evaluation" / "val" / "index.html").read_text() == "top1 0.6"
    (artifacts / "evaluation" / "val" / "index.html").unlink()
    assert MLflowTracker(uri=local_uri).send(run).num_files == 1
    assert page_files(local_uri, run.tracking_id) == expected


def test_the_latest_score_of_an_evaluation_is_shown_at_step_0(tmp_path: Path, local_uri: str) -> None:
    run = make_run(tmp_path / "runs" / "mine")
    write_evaluation(run, "test", top1=0.5)
    write_evaluation(run, "val", top1=0.25)
    MLflowTracker(uri=local_uri).send(run)
    found = page_points(local_uri, run.tracking_id)
    assert found["test/top1"] == [(0, 0.5)]
    assert found["evaluation/val/top1"] == [(0, 0.25)]
    assert found["test/calibration_error"] == [(0, 0.25)]
    assert "test/f1" not in found
    write_evaluation(run, "test", top1=0.4)
    assert MLflowTracker(uri=local_uri).send(run).num_points == 1
    assert MLflowTracker(uri=local_uri).send(run).num_points == 0
    assert pages(local_uri)[0].data.metrics["test/top1"] == 0.4


def test_the_next_training_ends_pages_of_runs_whose_process_is_gone(tmp_path: Path, local_uri: str) -> None:
    files = {
        "nothing": {},
        "killed": {"status.json": '{"state": "training", "step": 3}'},
        "failed": {"status.json": '{"state": "failed", "exit_code": 2}'},
        "damaged": {"status.json": '{"sta'},
        "finished": {"result.json": "{}", "status.json": '{"state": "training"}'},
        "cut": {"result.json": "{}"},
        "alive": {},
    }
    client, runs = MlflowClient(local_uri), {name: make_run(tmp_path / "runs" / name) for name in files}
    for run in runs.values():
        MLflowTracker(uri=local_uri).send(run)
    for name, run in runs.items():
        client.update_run(run.tracking_id, status="RUNNING")
        record_steps(run, (40, 50))
        for file, text in files[name].items():
            (run.folder / file).write_text(text)
    with runs["cut"].journal.path.open("a") as journal:
        journal.write("garbage\n")
    new, tracker = make_run(tmp_path / "runs" / "new"), MLflowTracker(uri=local_uri)
    with runs["alive"].locked(), new.locked():
        assert tracker.start(new, {}) is None
        for _ in range(10_000):
            if sum(page.info.status == "RUNNING" for page in pages(local_uri)) == 2:  # `alive` and `new`
                break
        assert tracker.finish("finished") is None
    found = {page.info.run_name: page.info.status for page in pages(local_uri)}
    ends = {"nothing": "KILLED", "killed": "KILLED", "failed": "FAILED", "damaged": "KILLED", "finished": "FINISHED"}
    assert found == {**ends, "cut": "KILLED", "alive": "RUNNING", "new": "FINISHED"}
    for name in ends:
        assert page_points(local_uri, runs[name].tracking_id) == journal_points(runs[name])


def test_a_page_that_was_deleted_stays_deleted(tmp_path: Path, local_uri: str) -> None:
    run = make_run(tmp_path / "runs" / "mine")
    mirror(local_uri, run)
    MlflowClient(local_uri).delete_run(run.tracking_id)
    sent = MLflowTracker(uri=local_uri).send(run)
    assert sent.problem == f"its page was deleted in MLflow: remove {run.tracking_id_file} for a new one"
    assert sent.is_answered
    assert pages(local_uri) == []
    run.tracking_id_file.unlink()
    assert MLflowTracker(uri=local_uri).send(run).num_points == 7
    assert len(pages(local_uri)) == 1


def test_without_a_dashboard_nothing_happens(tmp_path: Path) -> None:
    tracker, run = Tracker(), Run(tmp_path)
    assert tracker.start(run, {"seed": 0}) is None
    tracker.update()
    assert tracker.finish("finished") is None
    assert tracker.send(run) == (0, 0, None, True)
    assert (tracker.link, tracker.command, list(tmp_path.iterdir())) == (None, None, [])
