"""Verbs in this process, and a run that several tests read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data.shards.dataset import Dataset
from pipeline.report import __main__ as report_verb
from pipeline.train import __main__ as train_verb
from tests.support.commands import MINE, FinishedRun, Typed, call_verb, run_module, typed


@pytest.fixture
def train(with_digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Run `python -m pipeline.train ...` in a folder with the digits."""
    monkeypatch.chdir(with_digits)
    return typed(train_verb.VERB, train_verb.main, capsys)


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Run `python -m pipeline.report ...` of one network in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return typed(report_verb.VERB, report_verb.main, capsys)


@pytest.fixture(scope="session")
def main_job(tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> FinishedRun:
    """`python -m pipeline.train +model=resnet` with two epochs of five steps, in its own process."""
    root = tmp_path_factory.mktemp("main_job")
    shutil.copytree(digits.root, root / "datasets" / "digits")
    short = ("recipe.epochs=2", "+trainer.limit_train_batches=5", "log_every=2")
    answer = run_module(root, "pipeline.train", "+model=resnet", *short)
    assert answer.returncode == 0, answer.stderr
    (folder,) = (root / "runs").iterdir()
    return FinishedRun(root, folder, answer.stdout)


@pytest.fixture(scope="session")
def lenet_root(tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> Path:
    """A folder in which LeNet was trained for two epochs as the run `mine`."""
    root = tmp_path_factory.mktemp("lenet")
    shutil.copytree(digits.root, root / "datasets" / "digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        call_verb(train_verb.VERB, train_verb.main, list(MINE))
    return root


@pytest.fixture
def killed_run(lenet_root: Path, with_digits: Path) -> Path:
    """A copy of the run `mine` in the folder of `train`, as after a kill at its last step."""
    shutil.copy(lenet_root / "mlflow.db", with_digits)
    folder = shutil.copytree(lenet_root / "runs" / "mine", with_digits / "runs" / "mine")
    (folder / "result.json").unlink()
    return folder
