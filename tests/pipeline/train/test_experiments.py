"""Published recipes, those for CIFAR-10, and the one of the demo."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.build.network import build_averaging
from pipeline.cli.compose import CONF, compose
from pipeline.runs.run import Run
from pipeline.train.check import check_training
from tests.support.commands import Typed
from tests.support.resume import checkpoint

NAMES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
PUBLISHED = [name for name in NAMES if not name.startswith("cifar10")]
CIFAR10 = [name for name in NAMES if name.startswith("cifar10")]
TWO_STEPS = (
    *("data.root=datasets/digits", "data.batch_size=4", "recipe.accumulate=1", "recipe.epochs=1"),
    *("+trainer.limit_train_batches=2", "+trainer.limit_val_batches=1", "trainer=cpu", "tracking=none", "name=short"),
)
ABOVE_64_PIXELS = ("data.image_size=65", "augment.training.image_size=65")
# Of one network; the others train in the slow tests.
QUICK = ("cifar10_lenet", "cifar10_convnext_atto", "cifar10_coatnet_mini")
IMAGENET_IMAGES, DEVICES = 1_281_167, 8
VARIATIONS = ("ffcv_16", "ffcv_88", "nvidia_90", "timm_a1", "timm_a3", "torchvision_v1")


def test_the_recipes_of_many_publishers_are_there() -> None:
    assert len(PUBLISHED) == 12


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_complete(name: str) -> None:
    config = compose("train", [f"+experiment={name}", "data.root=anywhere"])
    check_training(config)
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    comment = " ".join(line for line in text.splitlines() if line.startswith("#"))
    assert "top-1" in comment
    assert "ImageNet-1k" in comment
    averaging, recipe = build_averaging(config), config.recipe
    steps = IMAGENET_IMAGES // (config.data.batch_size * recipe.accumulate * DEVICES) * recipe.epochs
    assert averaging is None or averaging.is_long_enough(steps)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in VARIATIONS)) for name in PUBLISHED]
)
def test_a_recipe_trains(train: Typed, with_digits: Path, name: str) -> None:
    train(f"+experiment={name}", *TWO_STEPS, *ABOVE_64_PIXELS)
    run = Run(with_digits / "runs" / "short")
    assert run.is_finished
    assert checkpoint(run.folder)["global_step"] == 2


def test_every_architecture_has_a_recipe_for_cifar10() -> None:
    models = {compose("train", [f"+experiment={name}"]).model._target_.rpartition(".")[2] for name in CIFAR10}
    assert models == {path.stem for path in (CONF / "model").glob("*.yaml")}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in CIFAR10]
)
def test_a_recipe_for_cifar10_trains(train: Typed, with_digits: Path, name: str) -> None:
    words = [f"+experiment={name}", *TWO_STEPS]
    config = compose("train", words)
    check_training(config)
    assert (config.data.image_size, config.recipe.epochs) == (32, 1)
    train(*words)
    assert checkpoint(with_digits / "runs" / "short")["global_step"] == 2


@pytest.mark.soak
def test_the_demo_reaches_what_the_readme_states(train: Typed, with_digits: Path) -> None:
    train("+model=resnet", "tracking=none", "name=demo")
    assert Run(with_digits / "runs" / "demo").result()["val/top1"] >= 0.97
