"""Every command that the README and docs/ show is run, in its order, on small data."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torchvision

from data.shards.dataset import Dataset
from models.residual import resnet
from pipeline import index, pack, sync
from pipeline.evaluate import __main__ as evaluate
from pipeline.export import __main__ as export
from pipeline.predict import __main__ as predict
from pipeline.report import __main__ as report
from pipeline.train import __main__ as train
from tests.support.commands import call_verb, run_module
from tests.support.images import make_folder
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text()
TEXTS = [README, *(file.read_text() for file in sorted((ROOT / "docs").glob("*.md")))]
# What makes a command short without changing what it is.
SHORTER = {
    "pipeline.train": [
        "recipe.epochs=1",
        "data.batch_size=10",
        "data.image_size=16",
        "tracking=none",
        "+trainer.limit_train_batches=2",
    ],
    "pipeline.pack": [],
    "pipeline.predict": ["batch_size=8"],
    "pipeline.evaluate": ["mlflow=false"],
    "pipeline.sync": [],
    "pipeline.export": ["compare_images=2", "val_images=4"],
    "torch.distributed.run": ["mlflow=false", "out=several"],
    "pipeline.report": ["effective_images=0", "batch_size=2", "data.image_size=64"],
}
# Verbs that run in this process, which has loaded torch; a comparison and several ranks need another process.
VERBS = {
    "pipeline.train": train,
    "pipeline.report": report,
    "pipeline.pack": pack,
    "pipeline.evaluate": evaluate,
    "pipeline.predict": predict,
    "pipeline.export": export,
    "pipeline.sync": sync,
    "pipeline.index": index,
}
NEEDS_PROCESS = ("models=", "trainer=ddp", "--nproc-per-node")
MAIN_JOB, NAME = "python -m pipeline.train +model=resnet", "mine"  # the run that the README calls NAME


# Those need a Slurm and a bucket: tests/pipeline/engines/test_slurm.py, tests/data/storage/test_training.py.
RUN_ELSEWHERE = ("sbatch", "s3://")


def blocks_of(language: str) -> list[str]:
    return [block for text in TEXTS for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]


def commands() -> list[str]:
    """The lines of all bash blocks, each once, without comments."""
    lines = [line.partition("#")[0].strip() for block in blocks_of("bash") for line in block.splitlines()]
    lines = [command for line in dict.fromkeys(lines) for command in tasks_of(line)]
    return [line for line in lines if line and not any(part in line for part in RUN_ELSEWHERE)]


def tasks_of(line: str) -> list[str]:
    """The command of each task of an array job; any other line alone."""
    array = re.search(r"--array=1-(\d+)", line)
    if array is None:
        return [line]
    command = shlex.split(line)[-1]
    return [command.replace("$SLURM_ARRAY_TASK_ID", str(number)) for number in range(1, int(array[1]) + 1)]


def run(command: str, folder: Path) -> None:
    """Run a command of the README in a folder; for `make`, check its recipe."""
    words = shlex.split(command)
    if words[0] == "make":  # the recipe is one of the commands that are run here, or runs these tests
        recipe = subprocess.run(["make", "-n", "-C", str(ROOT), *words[1:]], capture_output=True, text=True, check=True)
        assert words[1] == "install" or re.search(r"-m (pipeline\.train|pytest)", recipe.stdout), command
        return
    if "serve" in words:  # tests/pipeline/export/test_registry.py asks such a server
        assert words[2:5] == ["mlflow", "models", "serve"]
        return
    words[0] = words[0].removeprefix(".venv/bin/")
    if words[:2] != ["python", "-m"]:
        assert words == ["source", ".venv/bin/activate"], f"no test runs {command}"
        return
    arguments = [*words[3:], *SHORTER[words[2]], *(["name=" + NAME] if command == MAIN_JOB else [])]
    arguments = [word.replace("runs/NAME", f"runs/{NAME}") for word in arguments]
    if "names=timm" in words:  # whose strides are those for large images
        arguments = [word.replace(f"runs/{NAME}", str(run_for_large_images(folder))) for word in arguments]
    if "weights=resnet50.pth" in words:  # whose stem is the one for large images
        arguments.append("data.image_size=65")
    if any(word.startswith(NEEDS_PROCESS) for word in words):
        answer = run_module(folder, words[2], *arguments)
        assert answer.returncode == 0, f"{command}\n{answer.stderr[-2000:]}"
    else:
        verb = VERBS[words[2]]
        call_verb(verb.VERB, verb.main, arguments)


def run_for_large_images(folder: Path) -> Path:
    """The run that started from published weights."""
    return next(file.parent for file in (folder / "runs").glob("*/config.yaml") if "image_size: 65" in file.read_text())


@pytest.mark.engines
def test_everything_that_is_shown_works(
    tmp_path: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_folder(tmp_path / "photos", images=10)
    shutil.copytree(digits.root, tmp_path / "datasets" / "digits")
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "resnet50.pth")
    monkeypatch.chdir(tmp_path)
    for command in commands():
        run(command, tmp_path)
    assert len(commands()) >= 8
    assert len(list((tmp_path / "runs").iterdir())) == sum("pipeline.train" in command for command in commands())
    capsys.readouterr()
    for code in blocks_of("python"):
        exec(code.replace("runs/NAME", f"runs/{NAME}"), {"net": resnet("resnet18")})
    printed = capsys.readouterr().out
    assert "stages.stage4.1.conv2.0 Conv2d 3x3 (512, 7, 7)" in printed
    assert "photos/class1/00.jpg" in printed


def test_the_readme_shows_numbers_first_and_a_command_soon() -> None:
    lines = README.splitlines()
    assert len(lines) < 200
    assert any(line.startswith("| loader") for line in lines[:15])
    assert any("On a GPU" in line for line in lines[:18])
    assert "make demo" in "\n".join(lines[:25])


def test_the_files_that_the_readme_names_exist() -> None:
    paths = set(re.findall(r"`((?:models|data|pipeline|tests|conf|docs|benchmarks)/[\w./]+)`", "".join(TEXTS)))
    missing = {path for path in paths if not (ROOT / path).exists() and "NAME" not in path and "mine" not in path}
    assert len(paths) > 12
    assert missing == set()
