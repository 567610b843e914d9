"""The study of nine architectures, made brief for tests."""

from __future__ import annotations

import json
from pathlib import Path

NAMES = ("lenet", "alexnet", "vgg", "resnet", "resnext", "mobilenet", "efficientnet", "convnext", "coatnet")
BRIEF = "recipe.epochs=1,data.image_size=32,augment=small,tracking=none,+trainer.limit_train_batches=2"
FEW = "study.data.digits.pack=[source=digits,val_fraction=0.05]"  # large networks are slow on 359 images for evaluation
STUDY = ("+study=digits", FEW, f"study.train.overrides=[{BRIEF}]", "~study.report", "~study.export")
STEPS = {
    *("pack/digits", "compare/all"),
    *(step for name in NAMES for step in (f"train/{name}", f"evaluate/{name}/val")),
}


def compared(folder: Path) -> set[str]:
    """The runs in the comparison of a study's folder."""
    numbers = json.loads((folder / "comparison" / "comparison.json").read_text())
    return {run["name"] for run in numbers["runs"]}
