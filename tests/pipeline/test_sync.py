"""`sync` sends what MLflow lacks of runs, once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline import sync as sync_verb
from pipeline.cli.check import check_command_line
from tests.support.commands import Typed, typed
from tests.support.tracked import (
    answering,
    free_port,
    journal_points,
    make_run,
    page_files,
    page_points,
    pages,
    record_steps,
    write_evaluation,
)  # fmt: skip


@pytest.fixture
def sync(tmp_path: Path, local_uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Run `python -m pipeline.sync ...` in a folder with an empty database."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return typed(sync_verb.VERB, sync_verb.main, capsys)


def test_runs_that_never_reached_the_server_are_created_once(sync: Typed, local_uri: str) -> None:
    runs = [make_run(Path("runs") / name, seed=seed) for seed, name in enumerate(("a", "b"))]
    make_run(Path("runs") / "untracked", target="pipeline.tracking.tracker.Tracker")
    (Path("runs") / "no run").mkdir()
    runs[0].finish({})
    write_evaluation(runs[1], "test", top1=0.5)
    assert sync().splitlines() == [
        "runs/a: sent 7 points, 1 files; complete",
        "runs/b: sent 9 points, 3 files; complete",
    ]
    before = [(page_points(local_uri, run.tracking_id), page_files(local_uri, run.tracking_id)) for run in runs]
    assert before[0] == (journal_points(runs[0]), ["config/config.yaml"])
    assert before[1][0] == {**journal_points(runs[1]), "test/top1": [(0, 0.5)], "test/calibration_error": [(0, 0.25)]}
    assert sync().splitlines() == [f"runs/{name}: sent 0 points, 0 files; complete" for name in ("a", "b")]
    assert before == [(page_points(local_uri, run.tracking_id), page_files(local_uri, run.tracking_id)) for run in runs]
    ends = {(page.info.run_name, page.info.status, page.data.params["seed"]) for page in pages(local_uri)}
    assert ends == {("a", "FINISHED", "0"), ("b", "KILLED", "1")}


def test_a_run_is_named_by_its_folder_or_its_name(sync: Typed) -> None:
    make_run(Path("runs") / "mine")
    make_run(Path("runs") / "other")
    assert sync("runs/mine") == "runs/mine: sent 7 points, 1 files; complete\n"
    assert sync("mine") == sync("run=runs/mine") == "runs/mine: sent 0 points, 0 files; complete\n"
    with pytest.raises(FileNotFoundError, match="run=nothing is not one of the 2 runs in runs"):
        sync("nothing")
    with pytest.raises(FileNotFoundError, match="nowhere has no runs: runs=FOLDER sets the folder"):
        sync("runs=nowhere")
    with pytest.raises(ValueError, match="sync needs tracking=mlflow"):
        sync("tracking=none")
    assert check_command_line(sync_verb.VERB, ["runs/a b"]) == ["run='runs/a b'"]


def test_a_run_that_is_training_keeps_its_status_and_gets_its_points(sync: Typed, local_uri: str) -> None:
    run = make_run(Path("runs") / "mine")
    sync()
    MlflowClient(local_uri).update_run(run.tracking_id, status="RUNNING")
    with run.locked():
        record_steps(run, (40,))
        with run.journal.path.open("a") as journal:
            journal.write('{"step": 50, "train/lo')  # a line that is being written
        assert sync() == "runs/mine: sent 2 points, 0 files; complete\n"
    assert [page.info.status for page in pages(local_uri)] == ["RUNNING"]
    assert sync() == "runs/mine: sent 0 points, 0 files; complete\n"
    assert [page.info.status for page in pages(local_uri)] == ["KILLED"]


def test_two_servers_have_a_page_each(sync: Typed, local_uri: str, empty_store: Path) -> None:
    run = make_run(Path("runs") / "mine")
    shutil.copy(empty_store, "second.db")
    second = f"sqlite:///{Path('second.db').resolve()}"
    for words, points in ((), 7), ((f"tracking.uri={second}",), 7), ((), 0), ((f"tracking.uri={second}",), 0):
        assert sync(*words) == f"runs/mine: sent {points} points, {points // 7} files; complete\n"
        uri = second if words else local_uri
        assert [page.info.run_id for page in pages(uri)] == [run.tracking_id]
        assert page_points(uri, run.tracking_id) == journal_points(run)


def test_damage_is_named_and_other_runs_are_sent(sync: Typed, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {name: make_run(Path("runs") / name) for name in ("config", "journal", "sound")}
    runs["config"].config_file.write_text("model: [")
    text = runs["journal"].journal.path.read_text()
    runs["journal"].journal.path.write_text(text.replace("0.05", "0.06"))
    with pytest.raises(SystemExit) as ended:
        sync()
    assert ended.value.code == 2
    config, journal, sound = capsys.readouterr().out.splitlines()
    assert config.startswith("runs/config: sent 0 points, 0 files; runs/config/config.yaml is damaged: ")
    assert journal.startswith("runs/journal: sent 3 points, 0 files; runs/journal/metrics.jsonl, line 3 is damaged: ")
    assert sound == "runs/sound: sent 7 points, 1 files; complete"


@pytest.mark.parametrize("is_listening", [True, False])
def test_a_server_that_does_not_answer_is_exit_code_2(
    sync: Typed, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, is_listening: bool
) -> None:
    monkeypatch.setattr("pipeline.tracking.mirror.FIRST_PAUSE_SECONDS", 0.01)
    for name in ("a", "b", "c"):
        make_run(Path("runs") / name)
    with answering(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n") as broken:
        uri = broken if is_listening else f"http://127.0.0.1:{free_port()}"
        with pytest.raises(SystemExit) as ended:
            sync(f"tracking.uri={uri}")
    assert ended.value.code == 2
    first, rest = capsys.readouterr().out.splitlines()
    assert first.startswith(f"runs/a: sent 0 points, 0 files; MLflow at {uri} failed: ")
    assert rest == "2 more runs were not tried"
    assert not list(Path("runs").glob("*/mlflow_run_id"))


def test_the_parameters_of_a_training_are_those_of_its_folder(sync: Typed, lenet_root: Path, local_uri: str) -> None:
    shutil.copytree(lenet_root / "runs" / "mine", Path("runs") / "mine")
    (Path("runs") / "mine" / "mlflow_run_id").unlink()
    assert "complete" in sync()
    (trained,), (sent,) = pages(f"sqlite:///{lenet_root / 'mlflow.db'}"), pages(local_uri)
    assert len(sent.data.params) > 50
    assert sent.data.params == trained.data.params
    assert sent.data.metrics == trained.data.metrics
    assert json.loads(sent.data.tags["mlflow.loggedArtifacts"]) == json.loads(
        trained.data.tags["mlflow.loggedArtifacts"]
    )
    assert page_files(local_uri, sent.info.run_id) == [
        "config/config.yaml", "data/augmented.png", "receptive_field/layers.json", "receptive_field/report.html",
    ]  # fmt: skip
