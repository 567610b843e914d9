"""Which run a command means."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.runs.find import find_run

RUNS = {"resnet18-digits-1a2b": "9c0ffee" + "0" * 25, "resnet18-pets-3c4d": "", "lenet": "9cdddd" + "0" * 26}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    for number, (name, tracking_id) in enumerate(RUNS.items()):
        (folder / name / "checkpoints").mkdir(parents=True)
        (folder / name / "config.yaml").write_text("model: {}\n")
        if tracking_id:
            (folder / name / "mlflow_run_id").write_text(tracking_id + "\n")
        last = folder / name / "checkpoints" / "last.ckpt"
        last.write_bytes(b"")
        os.utime(last, (1000 - number, 1000 - number))
    (folder / "notes").mkdir()
    return folder


def test_folders_names_ids_and_beginnings(runs: Path) -> None:
    for text, name in (
        (str(runs / "lenet"), "lenet"),
        ("lenet", "lenet"),
        ("resnet18-d", "resnet18-digits-1a2b"),
        (RUNS["lenet"], "lenet"),
        ("9c0f", "resnet18-digits-1a2b"),
        ("latest", "resnet18-digits-1a2b"),
    ):
        found = find_run(text, runs=runs)
        assert (found.run.name, found.checkpoint) == (name, None)
    checkpoint = runs / "lenet" / "checkpoints" / "last.ckpt"
    assert find_run(str(checkpoint), runs=runs)[1] == checkpoint
    assert find_run(str(checkpoint), runs=runs).run.name == "lenet"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet18", "run=resnet18 matches 2 runs: resnet18-digits-1a2b, resnet18-pets-3c4d$"),
        ("9c", "run=9c matches 2 runs: lenet, resnet18-digits-1a2b$"),
        ("lenett", "run=lenett is not one of the 3 runs in .*: did you mean lenet"),
        ("nowhere/best.ckpt", "run=nowhere/best.ckpt does not exist$"),
        ("RUNS/notes", "run=.*/notes is not a run: it has no config.yaml$"),
    ],
)
def test_what_means_no_run_or_several_is_one_sentence(runs: Path, text: str, message: str) -> None:
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        find_run(text.replace("RUNS", str(runs)), runs=runs)
    with pytest.raises(FileNotFoundError, match=r"^run=latest does not exist, and .* has no runs: give the folder"):
        find_run("latest", runs=runs / "notes")


def test_a_folder_of_something_else_does_not_hide_a_run(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.parent)
    for name in ("lenet", "photos"):
        (runs.parent / name).mkdir()
    assert find_run("lenet", runs=runs).run.folder == runs / "lenet"
    with pytest.raises(FileNotFoundError, match=r"^run=photos is not a run: it has no config.yaml$"):
        find_run("photos", runs=runs)
