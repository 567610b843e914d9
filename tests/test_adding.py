"""Extensions are one file plus one YAML each: they are added in a copy of the project and used."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from data.shards.dataset import Dataset
from data.shards.indexing import open_dataset
from tests.support.commands import run_module
from tests.support.images import make_jpeg
from tests.support.paths import ROOT

NETWORK = '''"""A network of three stages, for a test."""

from __future__ import annotations

from typing import Unpack

from models.layers import ConvNet, PooledLinear, conv_norm, relu
from models.options import Options, Settings, apply_options, find_variant, resolve_options

TRINETS = {"trinet": (8, 16, 32)}


def trinet(variant: str = "trinet", **options: Unpack[Options]) -> ConvNet:
    """Build three strided convolutions.

    Shapes: (N, in_channels, H, W) -> (N, num_classes), H and W at least 1.
    """
    first, second, third = find_variant(variant, TRINETS)
    settings = resolve_options(Settings(), options)
    stages = {
        "stage1": conv_norm(first, second, kernel_size=3, stride=2, activation=relu),
        "stage2": conv_norm(second, third, kernel_size=3, stride=2, activation=relu),
    }
    head = PooledLinear(third, settings.num_classes, dropout=settings.dropout)
    stem = conv_norm(settings.in_channels, first, kernel_size=3, stride=2, activation=relu)
    return apply_options(ConvNet(stem, stages, head=head), settings, options=options)
'''
# That of the documentation, under another name.
NETWORK_CONFIG = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)[0]
NETWORK_CONFIG = NETWORK_CONFIG.replace("mine", "trinet")
ROW = '    Published("trinet", "trinet", 39_088, 0.009967, 224, "by hand"),\n'

# A file of code and a config for each, by what they extend.
PARTS = {
    "an augmentation": (
        "data/augment/corner.py",
        '''"""The upper left quarter of each image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.augment.crops import CropWindows
from data.draws import Samples


@dataclass(frozen=True)
class CornerCrop:
    """Show the upper left quarter."""

    image_size: int

    def crops(self, sizes: NDArray[np.int64], samples: Samples, *, seed: int, epoch: int) -> CropWindows:
        """Crop. Shapes: sizes (N, 2), samples (N,) -> arrays of (N, ...)."""
        print("corner crops")
        shape = (sizes // 2).astype(np.int32)
        return CropWindows(np.zeros_like(shape), shape, np.zeros(len(sizes), np.int32))
''',
        "conf/augment/corner.yaml",
        """training: {_target_: data.augment.corner.CornerCrop, image_size: "${data.image_size}"}
evaluation: {_target_: data.augment.crops.EvaluationCrop, image_size: "${data.image_size}", crop_fraction: 1.0}
""",
    ),
    "a loss": (
        "models/learning/focal.py",
        '''"""The focal loss of Lin et al. 2017."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def focal_loss(logits: Tensor, labels: Tensor, *, gamma: float) -> Tensor:
    """Weight the cross-entropy of each image. Shapes: (N, K), (N,) -> (N,)."""
    losses = functional.cross_entropy(logits, labels, reduction="none")
    return (1 - (-losses).exp()) ** gamma * losses
''',
        "conf/loss/focal.yaml",
        """# @package recipe.loss
_target_: models.learning.focal.focal_loss
_partial_: true
gamma: 2.0
""",
    ),
    "an optimizer": (
        "models/learning/heavy.py",
        '''"""SGD with more momentum."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT


class HeavySGD(torch.optim.SGD):
    """SGD with a momentum of 0.99."""

    def __init__(self, params: ParamsT, *, lr: float) -> None:
        super().__init__(params, lr=lr, momentum=0.99)
''',
        "conf/optimizer/heavy.yaml",
        """# @package recipe.optimizer
_target_: models.learning.heavy.HeavySGD
_partial_: true
lr: 1.0e-4
""",
    ),
    "a schedule": (
        "models/learning/triangle.py",
        '''"""A schedule that rises and falls linearly."""

from __future__ import annotations


def triangle(progress: float, *, peak: float) -> float:
    """Rise until `peak`, fall until the end."""
    return min(progress / peak, (1 - progress) / (1 - peak))
''',
        "conf/schedule/triangle.yaml",
        """# @package recipe.schedule
_target_: models.learning.triangle.triangle
_partial_: true
peak: 0.3
""",
    ),
    "a callback": (
        "pipeline/train/callbacks/shout.py",
        '''"""A callback that prints."""

from __future__ import annotations

import pytorch_lightning as pl

from models.learning.classifier import Classifier


class Shout(pl.Callback):
    """Print a word at the end of each epoch."""

    def __init__(self, word: str) -> None:
        self.word = word

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the word and the parts of the recipe."""
        assert isinstance(pl_module, Classifier)
        print(self.word, type(trainer.optimizers[0]).__name__, pl_module.recipe.loss, pl_module.recipe.schedule)
''',
        "conf/callbacks/shout.yaml",
        "shout: {_target_: pipeline.train.callbacks.shout.Shout, word: hooray}\n",
    ),
}
SOURCE = '''"""Images listed in a file: a path and a class per line."""

from __future__ import annotations

from pathlib import Path

from data.shards.sources import Item, Source, split_off


def listed(file: str, name: str, *, val_fraction: float, seed: int) -> Source:
    """Read the list."""
    rows = [line.split() for line in Path(file).read_text().splitlines()]
    classes = tuple(sorted({row[1] for row in rows}))
    items = [Item(Path(path).stem, classes.index(label), "jpg", Path(path)) for path, label in rows]
    return Source(name, classes, split_off(items, val_fraction=val_fraction, seed=seed))
'''
SHORT = ("recipe.epochs=1", "+trainer.limit_train_batches=2", "+trainer.limit_val_batches=1", "tracking=none")


def copy_project(folder: Path) -> Path:
    """Copy what git would check out."""
    for name in ("benchmarks", "conf", "data", "docs", "models", "pipeline", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "requirements.lock"):
        shutil.copy(ROOT / name, folder)
    if (ROOT / ".mypy_cache").is_dir():  # saves 20 seconds a copy
        shutil.copytree(ROOT / ".mypy_cache", folder / ".mypy_cache")
    return folder


def add_network(folder: Path) -> None:
    """Add builder, YAML and row."""
    (folder / "models" / "trinet.py").write_text(NETWORK)
    (folder / "conf" / "model" / "trinet.yaml").write_text(NETWORK_CONFIG)
    published = folder / "tests" / "support" / "published.py"
    text = published.read_text()
    place = text.index('    Published("coatnet", "coatnet_0"')
    published.write_text(text[:place] + ROW + text[place:])


def assert_in_order(folder: Path) -> None:
    """Assert that linters and the tests of the structure accept the copy."""
    linters = (("ruff", "check", "."), ("mypy",), ("pytest", "-p", "no:cacheprovider", "tests/test_structure.py"))
    for words in linters:
        answer = run_module(folder, *words, root=folder)
        assert answer.returncode == 0, f"{words}: {answer.stdout[-2000:]}{answer.stderr[-500:]}"


@pytest.mark.engines
def test_a_network_and_parts_of_a_training_are_a_file_and_a_config_each(tmp_path: Path, digits: Dataset) -> None:
    folder = copy_project(tmp_path)
    shutil.copytree(digits.root, folder / "datasets" / "digits")
    add_network(folder)
    add_parts(folder)
    use_network(folder)
    use_parts(folder)
    assert_in_order(folder)


def use_network(folder: Path) -> None:
    """Run the network's tests, and train it."""
    quiet, golden_test = ("-p", "no:cacheprovider"), "tests/models/analysis/test_golden.py"
    golden = run_module(folder, "pytest", *quiet, "-k", "trinet", "--rewrite-golden", golden_test, root=folder)
    assert golden.returncode == 0, golden.stdout[-3000:]
    chosen = "trinet or there_is_a_row or golden_report"
    answer = run_module(folder, "pytest", *quiet, "-k", chosen, "tests/models", "tests/pipeline/cli", root=folder)
    assert answer.returncode == 0, answer.stdout[-3000:]
    assert int(answer.stdout.split(" passed")[0].split()[-1]) >= 15, answer.stdout
    answer = run_module(folder, "pipeline.train", "+model=trinet", *SHORT, root=folder)
    assert answer.returncode == 0, answer.stderr
    assert "trinet, 6,418 parameters" in answer.stdout


def add_parts(folder: Path) -> None:
    """Add the code and the config of each part."""
    for code, text, config, values in PARTS.values():
        assert not (folder / code).exists()
        (folder / code).write_text(text)
        (folder / config).write_text(values)


def use_parts(folder: Path) -> None:
    """Train with all parts."""
    chosen = ("augment=corner", "loss=focal", "optimizer=heavy", "schedule=triangle", "callbacks=shout")
    answer = run_module(folder, "pipeline.train", "+model=lenet", *chosen, *SHORT, "data.image_size=32", root=folder)
    assert answer.returncode == 0, answer.stderr
    assert len(PARTS) == 5
    assert "corner crops" in answer.stdout
    assert re.search("hooray HeavySGD .*focal_loss.*triangle", answer.stdout)


def test_a_source_of_images_is_a_function_and_a_config(tmp_path: Path) -> None:
    folder = copy_project(tmp_path)
    (folder / "data" / "shards" / "listed.py").write_text(SOURCE)
    (folder / "conf" / "source" / "listed.yaml").write_text("_target_: data.shards.listed.listed\nfile: ???\n")
    lines = []
    for number in range(8):
        (folder / f"{number}.jpg").write_bytes(make_jpeg(20, 30, seed=number))
        lines.append(f"{folder / f'{number}.jpg'} {'cat' if number % 2 else 'dog'}")
    (folder / "list.txt").write_text("\n".join(lines))
    answer = run_module(folder, "pipeline.pack", "source=listed", "source.file=list.txt", "name=pets", root=folder)
    assert answer.returncode == 0, answer.stderr
    dataset, _ = open_dataset(folder / "datasets" / "pets")
    assert dataset.classes == ("cat", "dog")


@pytest.mark.slow
def test_a_config_without_a_row_fails(tmp_path: Path) -> None:
    folder = copy_project(tmp_path)
    add_network(folder)
    published = folder / "tests" / "support" / "published.py"
    published.write_text(published.read_text().replace(ROW, ""))
    words = ("-p", "no:cacheprovider", "-k", "there_is_a_row", "tests/models/test_published.py")
    answer = run_module(folder, "pytest", *words, root=folder)
    assert answer.returncode == 1
    assert "trinet" in answer.stdout
