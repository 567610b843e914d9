"""Databases and servers that fail, hang or are none: a training continues, and nothing is lost or doubled."""

from __future__ import annotations

import itertools
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.cli.secrets import mask_address
from pipeline.tracking import mirror, mlflow_tracker
from pipeline.tracking.mlflow_tracker import MLflowTracker
from pipeline.tracking.store import Store
from tests.support.tracked import answering, free_port, journal_points, make_run, page_points, pages, record_steps

UPLOAD = "log_artifact"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of a tenth of a second, so that the tests need not wait for them."""
    monkeypatch.setattr(mlflow_tracker, "START_SECONDS", 0.1)
    monkeypatch.setattr(mlflow_tracker, "FINAL_SECONDS", {"finished": 60.0, "stopped": 0.1, "failed": 0.1})
    for name in ("FIRST_PAUSE_SECONDS", "LONGEST_PAUSE_SECONDS", "SECONDS_BETWEEN_REQUESTS"):
        monkeypatch.setattr(mirror, name, 0.01)


def test_a_database_that_a_kill_left_half_created_is_created_anew(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    for end in ("", "-journal"):
        file.with_name(f".mlflow.db.new{end}").write_bytes(b"half of a database")
    _, experiment_id = Store(f"sqlite:///{file}").open()
    assert Store(f"sqlite:///{file}").open()[1] == experiment_id
    assert not list(tmp_path.glob(".mlflow.db.new*"))


class Failing:
    """A client whose calls fail where `fails` says so, before or after the server has done what they ask for."""

    def __init__(self, client: MlflowClient, fails: Callable[[str], str | None]) -> None:
        self.client, self.fails = client, fails

    def __getattr__(self, name: str) -> Callable[..., object]:
        def call(*words: object, **options: object) -> object:
            failure = self.fails(name)
            if failure == "before":
                raise MlflowException(f"{name} did not reach the server")
            answer = getattr(self.client, name)(*words, **options)
            if failure == "after":
                raise MlflowException(f"the answer of {name} was lost")
            return answer

        return call


def let_fail(monkeypatch: pytest.MonkeyPatch, fails: Callable[[str], str | None]) -> None:
    """Let calls of every client fail."""
    open_store = Store.open

    def opened(store: Store) -> tuple[Failing, str]:
        client, experiment_id = open_store(store)
        return Failing(client, fails), experiment_id

    monkeypatch.setattr(Store, "open", opened)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_calls_that_fail_are_tried_again_and_double_nothing(
    tmp_path: Path, local_uri: str, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    draws, failed = random.Random(0), set[str]()

    def fails(name: str) -> str | None:  # the first call of each kind, and then a third of them
        if name in failed and draws.random() > 0.3:
            return None
        failed.add(name)
        return moment

    run, tracker = make_run(tmp_path / "runs" / "mine"), MLflowTracker(uri=local_uri)
    with monkeypatch.context() as patch, run.locked():
        let_fail(patch, fails)
        patch.setattr(mirror, "LAST_TRIES", 100)
        assert "the training does without it" in str(tracker.start(run, {"seed": 0}))
        for step in range(40, 80):
            record_steps(run, (step,))
            tracker.update()
        assert tracker.finish("finished") is None
    (page,) = pages(local_uri)
    assert page.info.status == "FINISHED"
    assert page_points(local_uri, page.info.run_id) == journal_points(run)
    assert {"create_run", "log_batch", "get_run", "set_terminated", UPLOAD} <= failed


def test_a_page_without_all_points_is_not_finished(
    tmp_path: Path, local_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tracker = make_run(tmp_path / "runs" / "mine"), MLflowTracker(uri=local_uri)
    batches = itertools.count()
    with monkeypatch.context() as patch, run.locked():
        let_fail(patch, lambda name: "before" if name == "log_batch" and next(batches) >= 3 else None)
        assert tracker.start(run, {"seed": 0}) is None
        record_steps(run, range(40, 4000))
        problem = tracker.finish("finished")
    assert problem == (
        f"MLflow at {local_uri} failed: log_batch did not reach the server; "
        f"python -m pipeline.sync {run.folder} tracking.uri={local_uri} sends the rest"
    )
    (page,) = pages(local_uri)
    assert page.info.status == "RUNNING"
    run.finish({})
    sent = MLflowTracker(uri=local_uri).send(run)
    assert (sent.problem, sent.num_points > 1000) == (None, True)
    (page,) = pages(local_uri)
    assert page.info.status == "FINISHED"
    assert page_points(local_uri, page.info.run_id) == journal_points(run)


def test_an_artifact_store_that_fails_does_not_hold_up_points(
    tmp_path: Path, local_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(name: str) -> str | None:
        if name == UPLOAD:
            raise ModuleNotFoundError("No module named 'boto3'")
        return None

    run, tracker = make_run(tmp_path / "runs" / "mine"), MLflowTracker(uri=local_uri)
    let_fail(monkeypatch, fails)
    with run.locked():
        assert tracker.start(run, {"seed": 0}) is None
        problem = tracker.finish("finished")
    assert problem is not None
    assert problem.startswith(f"MLflow at {local_uri} failed: No module named 'boto3'; python -m pipeline.sync ")
    (page,) = pages(local_uri)
    assert (page.info.status, page_points(local_uri, page.info.run_id)) == ("FINISHED", journal_points(run))


@pytest.mark.parametrize(
    "answer",
    [
        None,
        b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{",
        b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>",
        b"",
    ],
    ids=["silent", "500", "cut off", "401", "another server", "hangs up"],
)
def test_a_server_that_gives_no_answer_ends_nothing(tmp_path: Path, answer: bytes | None) -> None:
    run = make_run(tmp_path / "runs" / "mine")
    before = run.journal.path.read_bytes()
    with answering(answer) as uri, run.locked():
        tracker = MLflowTracker(uri=uri)
        begun = tracker.start(run, {"seed": 0})  # returns although a silent server has not answered
        assert str(begun).startswith(f"MLflow at {uri} {'has not answered yet' if answer is None else 'failed: '}")
        tracker.update()
        problem = tracker.finish("stopped")
    assert str(problem).startswith(f"MLflow at {uri} ")
    assert str(problem).endswith(f"; python -m pipeline.sync {run.folder} tracking.uri={uri} sends the rest")
    assert "\n" not in str(begun) + str(problem)
    assert (tracker.link, run.tracking_id, run.journal.path.read_bytes()) == (None, "", before)


@pytest.mark.parametrize(
    "address",
    [
        "nothing listens", "no database", "another program's database", "beside a file", "foo://bar", "http://",
        "postgresql://user:word@127.0.0.1:9/name", "mysql+pymysql://127.0.0.1:9/name", "databricks",
    ],
)  # fmt: skip
def test_an_address_that_leads_nowhere_is_one_line(tmp_path: Path, address: str) -> None:
    (tmp_path / "text").write_text("not a database, whatever its name")
    with sqlite3.connect(tmp_path / "other.db") as database:
        database.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        database.execute("INSERT INTO alembic_version VALUES ('0123456789ab')")
    database.close()
    uri = {
        "nothing listens": f"http://127.0.0.1:{free_port()}",
        "no database": f"sqlite:///{tmp_path / 'text'}",
        "another program's database": f"sqlite:///{tmp_path / 'other.db'}",
        "beside a file": f"sqlite:///{tmp_path / 'text' / 'mlflow.db'}",
    }.get(address, address)
    run, tracker = make_run(tmp_path / "runs" / "mine"), MLflowTracker(uri=uri)
    with run.locked():
        begun, problem = tracker.start(run, {"seed": 0}), tracker.finish("failed")
    for text in (begun, problem):
        assert text is not None
        assert text.startswith(f"MLflow at {mask_address(uri)} ")
        assert "\n" not in text
        assert len(text) < 500
    assert (tmp_path / "text").read_text() == "not a database, whatever its name"
