"""Commands as they are typed, in this process or another, and what runs leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from omegaconf import DictConfig

from pipeline.cli.check import check_command_line
from pipeline.cli.compose import compose
from pipeline.cli.run import check_config
from pipeline.cli.verb import Verb
from tests.support.paths import ROOT

COMPUTED = (
    "step", "train/loss", "train/top1", "train/top5", "train/lr",
    "val/loss", "val/top1", "val/top5", "val/f1_macro", "val/balanced_accuracy",
    "val_ema/loss", "val_ema/top1", "val_ema/top5", "val_ema/f1_macro", "val_ema/balanced_accuracy",
)  # fmt: skip

TINY = ("recipe.epochs=2", "data.batch_size=256", "log_every=2")
MINE = ("+model=lenet", *TINY, "+trainer.limit_val_batches=1", "name=mine")  # one batch, not all
# A network without batch norm in float64: another order of summation changes it far less than a wrong batch.
PLAIN = (
    "+model=resnet", "model._target_=tests.support.networks.plain", "trust=true", "trainer.precision=64-true",
    "recipe.clip_norm=1.0",
)  # fmt: skip
TWO_RANKS = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")

Run = Callable[..., subprocess.CompletedProcess[str]]  # a verb and its arguments
Typed = Callable[..., str]  # arguments -> what was printed


class FinishedRun(NamedTuple):
    """A run: the folder in which the command was typed, the run's own folder, and what it printed."""

    root: Path
    folder: Path
    printed: str

    def in_mlflow(self) -> tuple[MlflowClient, MlflowRun]:
        """Return the run as the dashboard has it, and the client to ask for more."""
        client = MlflowClient(f"sqlite:///{self.root / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("convoy")
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id])
        return client, run


def run_module(folder: Path, *words: str, root: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m WORDS...` in a folder, with the project at `root`; returns exit code, stdout and stderr."""
    environment = {**os.environ, "PYTHONPATH": str(root), **variables}
    command = [sys.executable, "-m", *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def ran_steps(answer: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the steps of which the answer of `pipeline.workflow` has a line, with `!` for those that failed."""
    lines = [line.split("  ") for line in answer.stdout.splitlines() if "/" in line.split("  ")[0]]
    return sorted(words[0] + "!" * any("failed with exit code" in word for word in words) for words in lines)


def call_verb(verb: Verb, main: Callable[[DictConfig], None], words: list[str]) -> None:
    """Run a verb in this process, which has loaded torch."""
    arguments = check_command_line(verb, words)
    config = compose(verb.name, arguments)
    check_config(config, arguments, verb=verb)
    main(config)


def typed(verb: Verb, main: Callable[[DictConfig], None], capsys: pytest.CaptureFixture[str]) -> Typed:
    """Return a function that runs a verb in this process and returns what it printed."""

    def run(*words: str) -> str:
        call_verb(verb, main, list(words))
        return capsys.readouterr().out

    return run


def journal(folder: Path) -> list[dict[str, float]]:
    """Read the lines of a run's journal, without measured times and memory, and without facts of the network."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    points = [line for line in lines if line["step"] > 0]
    return [{key: value for key, value in line.items() if key in COMPUTED} for line in points]
