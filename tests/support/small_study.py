"""A study of two short trainings, of which one fails, in a copy of the project."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support.commands import run_module

STUDY = """
data:
  digits: {pack: [source=digits], train: [data=digits]}
train:
  overrides: [+model=lenet, tracking=none, recipe.epochs=2, data.batch_size=256, +trainer.limit_train_batches=2]
  runs:
    good: []
    bad: [recipe.optimizer.lr=1e30]
evaluate: {val: [split=val]}
report: {}
export: {weights: [format=safetensors]}
compare: [mlflow=false]
"""


def workflow(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run_module(project / "work", "pipeline.workflow", "+study=two", *words, root=project)
