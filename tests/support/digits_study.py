"""The study of nine architectures, made brief for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

FAMILIES = ("lenet", "resnet", "mobilenet", "convnext")  # a network each
NAMES = ("lenet", "alexnet", "vgg", "resnet", "resnext", "mobilenet", "efficientnet", "convnext", "coatnet")
BRIEF = "recipe.epochs=1,data.image_size=32,augment=small,tracking=none,+trainer.limit_train_batches=2"
FEW = "study.data.digits.pack=[source=digits,val_fraction=0.05]"  # large networks are slow on 359 images for evaluation
STUDY = ("+study=digits", FEW, f"study.train.overrides=[{BRIEF}]", "~study.report", "~study.export")


def without_others(names: Sequence[str]) -> list[str]:
    """Return the words that leave all other runs out of the study."""
    return [f"~study.train.runs.{name}" for name in NAMES if name not in names]


def steps_of(names: Sequence[str]) -> set[str]:
    """Return the steps of a study of these runs."""
    steps = {step for name in names for step in (f"train/{name}", f"evaluate/{name}/val")}
    return {"pack/digits", "compare/all", *steps}


def compared(folder: Path) -> set[str]:
    """The runs in the comparison of a study's folder."""
    numbers = json.loads((folder / "comparison" / "comparison.json").read_text())
    return {run["name"] for run in numbers["runs"]}
