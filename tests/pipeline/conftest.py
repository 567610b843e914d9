"""What tests of verbs need: the digits packed, commands in this process, the points of a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data.dataset import Dataset
from pipeline import report as reports
from pipeline import train as trainings
from pipeline.config import check_command_line, check_targets, compose

COMPUTED = ("step", "train/loss", "train/top1", "train/top5", "train/lr", "val/loss", "val/top1", "val/top5")

Train = Callable[..., str]
Report = Callable[..., str]


@pytest.fixture
def with_digits(tmp_path: Path, digits: Dataset) -> Path:
    """The working folder of `run_verb`, with the digits packed where the config expects them."""
    shutil.copytree(digits.root, tmp_path / "datasets" / "digits")
    return tmp_path


@pytest.fixture
def train(with_digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Train:
    """Type `python -m pipeline.train ...` in this process, which has loaded Lightning; returns what it printed."""

    def typed(*words: str) -> str:
        config = compose("train", check_command_line("train", list(words)))
        check_targets(config)
        trainings.main(config)
        return capsys.readouterr().out

    monkeypatch.chdir(with_digits)
    return typed


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Report:
    """Type `python -m pipeline.report ...` of one network in this process; returns what it printed."""

    def typed(*words: str) -> str:
        config = compose("report", check_command_line("report", list(words)))
        check_targets(config)
        reports.main(config)
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    return typed


def journal(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's journal, without what a clock has measured."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key in COMPUTED} for line in lines]
