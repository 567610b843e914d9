"""What tests of verbs need: the digits packed, commands in this process, the points of a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from data.shards.dataset import Dataset
from pipeline.cli.config import check_command_line, check_targets, compose
from pipeline.report import __main__ as reports
from pipeline.train import __main__ as trainings

COMPUTED = ("step", "train/loss", "train/top1", "train/top5", "train/lr", "val/loss", "val/top1", "val/top5")

Train = Callable[..., str]
Report = Callable[..., str]


def typing(verb: str, main: Callable[[DictConfig], None], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`python -m pipeline.VERB ...` in this process, which has loaded torch; it returns what was printed."""

    def typed(*words: str) -> str:
        config = compose(verb, check_command_line(verb, list(words)))
        check_targets(config)
        main(config)
        return capsys.readouterr().out

    return typed


@pytest.fixture
def with_digits(tmp_path: Path, digits: Dataset) -> Path:
    """The working folder of `run_verb`, with the digits packed where the config expects them."""
    shutil.copytree(digits.root, tmp_path / "datasets" / "digits")
    return tmp_path


@pytest.fixture
def train(with_digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Train:
    """Type `python -m pipeline.train ...` in this process."""
    monkeypatch.chdir(with_digits)
    return typing("train", trainings.main, capsys)


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Report:
    """Type `python -m pipeline.report ...` of one network in this process."""
    monkeypatch.chdir(tmp_path)
    return typing("report", reports.main, capsys)


def journal(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's journal, without what a clock has measured."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key in COMPUTED} for line in lines]
