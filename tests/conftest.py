"""Fixtures of all tests: small data sets, and verbs as commands."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

# Beside another worker torch keeps to one thread: more would compete for the same cores. It reads this on import.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from data.shards import sources
from data.shards.dataset import Dataset
from data.shards.pack import PackSettings, pack
from tests.support.commands import Run, run_module
from tests.support.images import make_jpeg, orientation

# No deadline: a property is not a speed. Derandomised: a failure belongs to the change, not to chance.
settings.register_profile("convoy", deadline=None, derandomize=True)
settings.load_profile("convoy")

FIRST = ("test_readme.py", "test_slurm.py", "test_workflow.py", "test_adding.py", "test_digits_study.py")  # the longest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the project's options."""
    parser.addoption("--rewrite-golden", action="store_true", help="rewrite tests/golden/; read the diff")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest tests, so that no worker waits for them at the end."""
    ranks = {name: rank for rank, name in enumerate(FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(FIRST)))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """scikit-learn's digits, packed into three shards."""
    folder = tmp_path_factory.mktemp("datasets") / "digits"
    return pack(sources.digits(val_fraction=0.2, seed=0), folder).dataset


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """JPEGs of many shapes in five classes, packed into small shards, with a validation split."""
    root = tmp_path_factory.mktemp("photographs")
    sizes = [(375, 500), (500, 375), (333, 517), (64, 48), (256, 256), (700, 901), (224, 224), (100, 300)]
    for label in range(5):
        for number, (height, width) in enumerate(sizes):
            path = root / f"class{label}" / f"{number}.jpg"
            path.parent.mkdir(exist_ok=True)
            options = {"exif": orientation(6)} if number == 2 else {"subsampling": number % 3}
            path.write_bytes(make_jpeg(height, width, seed=label * 10 + number, **options))
    source = sources.folder(root, "photographs", val_fraction=0.4, seed=0)
    return pack(
        source, tmp_path_factory.mktemp("datasets") / "photographs", settings=PackSettings(shard_samples=7)
    ).dataset


@pytest.fixture
def run_verb(tmp_path: Path) -> Run:
    """Run `python -m pipeline.VERB ...` in an empty folder."""

    def run(verb: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return run_module(tmp_path, f"pipeline.{verb}", *words, **variables)

    return run


@pytest.fixture
def with_digits(tmp_path: Path, digits: Dataset) -> Path:
    """The folder of `run_verb`, with the digits packed where the config expects them."""
    shutil.copytree(digits.root, tmp_path / "datasets" / "digits")
    return tmp_path


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with all tables and no experiment of ours, which takes seconds to create."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def local_uri(tmp_path: Path, empty_store: Path) -> str:
    """The address of an empty MLflow database in the test's folder."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"
