"""Every command that the README shows is run, in its order, on small data."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

from data.shards.dataset import Dataset
from models.residual import resnet
from pipeline.cli.config import check_command_line, compose
from pipeline.report import __main__ as report
from pipeline.train import __main__ as train
from tests.conftest import ROOT, make_folder

# What makes a command of the README short without changing what it is.
SMALL = {
    "pipeline.train": [
        "recipe.epochs=1",
        "data.batch_size=10",
        "data.image_size=16",
        "tracking=none",
        "+trainer.limit_train_batches=2",
    ],
    "pipeline.pack": [],
    "pipeline.report": ["effective_images=0", "batch_size=2", "data.image_size=64"],
}
# What is run in this process, which has loaded torch; what asks Hydra for its words, or starts processes, is not.
HERE = {"pipeline.train": train.main, "pipeline.report": report.main}
MAIN_JOB, NAMED = "python -m pipeline.train +model=resnet", "mine"  # the run that a reader gives a name


def blocks_of(language: str) -> list[str]:
    blocks: list[str] = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return blocks


def commands() -> list[str]:
    """The lines of the README's bash blocks, without comments."""
    blocks = blocks_of("bash")
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def run(command: str, folder: Path) -> None:
    """Run a command of the README in a folder; of `make`, look at what it would run."""
    words = command.split()
    if words[0] == "make":  # its recipe is one of the commands that are run here or by the tests themselves
        recipe = subprocess.run(["make", "-n", "-C", str(ROOT), *words[1:]], capture_output=True, text=True, check=True)
        assert re.search(r"-m (pipeline\.train|pytest)", recipe.stdout), command
        return
    if words[:2] != ["python", "-m"]:
        assert words == ["source", ".venv/bin/activate"], f"no test runs {command}"
        return
    small = [*words[3:], *SMALL[words[2]], *(["name=" + NAMED] if command == MAIN_JOB else [])]
    small = [word.replace("runs/NAME", f"runs/{NAMED}") for word in small]
    if "weights=resnet50.pth" in words:  # whose stem is that for large images
        small.append("data.image_size=65")
    if words[2] in HERE and not any(word.startswith(("models=", "trainer=ddp")) for word in words):
        verb = words[2].partition(".")[2]
        HERE[words[2]](compose(verb, check_command_line(verb, small)))
        return
    answer = subprocess.run(
        [sys.executable, "-m", words[2], *small], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert answer.returncode == 0, f"{command}\n{answer.stderr[-2000:]}"


def test_every_command_of_the_readme_works(tmp_path: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "photos", images=10)
    shutil.copytree(digits.root, tmp_path / "datasets" / "digits")
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "resnet50.pth")
    monkeypatch.chdir(tmp_path)
    for command in commands():
        run(command, tmp_path)
    assert len(commands()) >= 8
    assert len(list((tmp_path / "runs").iterdir())) == sum("pipeline.train" in command for command in commands())


def test_the_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks_of("python")
    exec(code, {"net": resnet("resnet18")})
    assert "stages.stage4.1.conv2.0 Conv2d 3x3 (512, 7, 7)" in capsys.readouterr().out
