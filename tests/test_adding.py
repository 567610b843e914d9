"""Adding an architecture takes a builder, a YAML and a row: one is added in a copy of the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.shards.dataset import Dataset
from tests.conftest import ROOT

BUILDER = '''"""A network of three stages, for a test."""

from __future__ import annotations

from typing import Unpack

from torch import nn

from models.layers import ConvNet, PooledLinear, conv_norm, relu
from models.options import Options, Settings, find, finish, settle

TRINETS = {"trinet": (8, 16, 32)}


def trinet(variant: str = "trinet", **options: Unpack[Options]) -> ConvNet:
    """Three strided convolutions.

    Shapes: (N, in_channels, H, W) -> (N, num_classes), H and W at least 1.
    """
    first, second, third = find(variant, TRINETS)
    settings = settle(Settings(), options)
    stages = {
        "stage1": conv_norm(first, second, kernel_size=3, stride=2, activation=relu),
        "stage2": conv_norm(second, third, kernel_size=3, stride=2, activation=relu),
    }
    head = PooledLinear(third, settings.num_classes, dropout=settings.dropout)
    stem = conv_norm(settings.in_channels, first, kernel_size=3, stride=2, activation=relu)
    return finish(ConvNet(stem, stages, head=head), settings, options=options)
'''
# The one that the README shows, under another name.
CONFIG = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0].replace("mine", "trinet")
ROW = '    Published("trinet", "trinet", 39_088, 0.009967, 224, "by hand"),\n'


def copy_project(folder: Path) -> None:
    """What git would check out, without what a run leaves."""
    for name in ("conf", "data", "models", "pipeline", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "requirements.lock"):
        shutil.copy(ROOT / name, folder)


def add(folder: Path) -> None:
    """The builder, the YAML, the row."""
    (folder / "models" / "trinet.py").write_text(BUILDER)
    (folder / "conf" / "model" / "trinet.yaml").write_text(CONFIG)
    published = folder / "tests" / "published.py"
    text = published.read_text()
    place = text.index('    Published("coatnet", "coatnet_0"')
    published.write_text(text[:place] + ROW + text[place:])


def type_in(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`python -m ...` there."""
    command = [sys.executable, "-m", *words]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def test_an_architecture_is_a_builder_a_config_and_a_row(tmp_path: Path, digits: Dataset) -> None:
    copy_project(tmp_path)
    add(tmp_path)
    tests = [f"tests/models/test_{name}.py" for name in ("published", "networks")]
    answer = type_in(tmp_path, "pytest", "-p", "no:cacheprovider", "-k", "trinet or there_is_a_row", *tests)
    assert answer.returncode == 0, answer.stdout[-3000:]
    assert int(answer.stdout.split(" passed")[0].split()[-1]) >= 10, answer.stdout
    shutil.copytree(digits.root, tmp_path / "datasets" / "digits")
    short = ("recipe.epochs=1", "+trainer.limit_train_batches=2", "+trainer.limit_val_batches=1", "tracking=none")
    answer = type_in(tmp_path, "pipeline.train", "+model=trinet", *short)
    assert answer.returncode == 0, answer.stderr
    assert "trinet, 6,418 parameters" in answer.stdout


@pytest.mark.slow
def test_a_config_without_a_row_fails(tmp_path: Path) -> None:
    copy_project(tmp_path)
    add(tmp_path)
    published = tmp_path / "tests" / "published.py"
    published.write_text(published.read_text().replace(ROW, ""))
    answer = type_in(
        tmp_path, "pytest", "-p", "no:cacheprovider", "-k", "there_is_a_row", "tests/models/test_published.py"
    )
    assert answer.returncode == 1
    assert "trinet" in answer.stdout
