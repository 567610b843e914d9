"""What several tests need: small data sets, JPEGs made on the spot, and a way to type a command."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# Beside another worker torch keeps to one thread: two that wait for the same cores cost more than they do. It reads
# this when it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from data.shards import sources
from data.shards.dataset import Dataset
from data.shards.pack import pack

ROOT = Path(__file__).resolve().parent.parent
CIFAR = (
    ROOT.parent / "shared" / "data" / "cifar10-test.tar.xz"
)  # real photographs, where the checkout has them beside it

# No deadline: a property is not a speed. The same examples each time: a failure is the change's, not the day's.
settings.register_profile("convoy", deadline=None, derandomize=True)
settings.load_profile("convoy")

Run = Callable[..., subprocess.CompletedProcess[str]]


def pytest_addoption(parser: pytest.Parser) -> None:
    """What is typed beside pytest's own."""
    parser.addoption("--rewrite-golden", action="store_true", help="write tests/golden/ anew; read the diff")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest test, so that no worker waits at the end for the one that has it."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


def make_jpeg(height: int, width: int, seed: int = 0, **options: object) -> bytes:
    """A JPEG with coarse and fine detail in all three colours."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    pixels = (pixels + generator.integers(-20, 21, pixels.shape)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def make_folder(root: Path, *, classes: int = 3, images: int = 8, size: tuple[int, int] = (40, 56)) -> Path:
    """Class folders of JPEGs, each image another."""
    for label in range(classes):
        for number in range(images):
            path = root / f"class{label}" / f"{number:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(make_jpeg(*size, seed=label * images + number))
    return root


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
    return pack(source, tmp_path_factory.mktemp("datasets") / "photographs", shard_samples=7).dataset


@pytest.fixture
def run_verb(tmp_path: Path) -> Run:
    """Type `python -m pipeline.VERB ...` in an empty folder; returns exit code, stdout and stderr."""

    def run(verb: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        command = [sys.executable, "-m", f"pipeline.{verb}", *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    return run


def orientation(value: int) -> Image.Exif:
    """An EXIF block that says how the camera was held."""
    exif = Image.Exif()
    exif[0x0112] = value
    return exif
