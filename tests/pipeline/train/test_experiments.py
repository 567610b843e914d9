"""Published recipes: each is composed, built and trained for two steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cli.compose import CONF, compose
from pipeline.runs.run import Run
from pipeline.train.check import check_training
from tests.support.commands import Typed
from tests.support.resume import checkpoint

PUBLISHED = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml") if not path.stem.startswith("cifar10"))
SHORT = (
    *("data.root=datasets/digits", "data.image_size=65", "data.batch_size=4", "recipe.accumulate=1", "recipe.epochs=1"),
    *("augment.training.image_size=65", "+trainer.limit_train_batches=2", "+trainer.limit_val_batches=1"),
    *("trainer=cpu", "tracking=none", "name=short"),
)
# Of one network; the others train in the slow tests.
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


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in VARIATIONS)) for name in PUBLISHED]
)
def test_a_recipe_trains(train: Typed, with_digits: Path, name: str) -> None:
    train(f"+experiment={name}", *SHORT)
    run = Run(with_digits / "runs" / "short")
    assert run.is_finished
    assert checkpoint(run.folder)["global_step"] == 2
