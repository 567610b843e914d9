"""The study of nine architectures, on this machine and on Slurm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.runs.run import Run
from tests.support.commands import ran_steps, run_module

pytestmark = pytest.mark.cluster

NAMES = ("lenet", "alexnet", "vgg", "resnet", "resnext", "mobilenet", "efficientnet", "convnext", "coatnet")
BRIEF = "recipe.epochs=1,data.image_size=32,augment=small,tracking=none,+trainer.limit_train_batches=2"
STUDY = ("+study=digits", f"study.train.overrides=[{BRIEF}]", "~study.report", "~study.export")
FAILS = "study.train.runs.resnet=[+model=resnet,recipe.optimizer.lr=1e30]"
OF_RESNET = {"train/resnet", "evaluate/resnet/val", "compare/all"}
ALL = {
    "pack/digits",
    "compare/all",
    *(f"{step}" for name in NAMES for step in (f"train/{name}", f"evaluate/{name}/val")),
}
SOON = ("--slurm-init-seconds-before-status-checks=1", "--seconds-between-status-checks=1")
SMALL = ("--slurm-status-command=squeue", "--default-resources", "mem_mb=1900", "runtime=10")


def compared(folder: Path) -> set[str]:
    numbers = json.loads((folder / "comparison" / "comparison.json").read_text())
    return {run["name"] for run in numbers["runs"]}


def test_a_study_on_this_machine_that_fails_once(clone: Path) -> None:
    words = ("pipeline.workflow", *STUDY, "name=local", "jobs=2")
    failed = run_module(clone, *words, FAILS, root=clone)
    assert failed.returncode == 2, failed.stdout + failed.stderr
    assert set(ran_steps(failed)) == ALL - OF_RESNET | {"train/resnet!"}
    again = run_module(clone, *words, root=clone)
    assert again.returncode == 0, again.stdout + again.stderr
    assert set(ran_steps(again)) == OF_RESNET
    assert compared(clone / "studies" / "local") == set(NAMES)

    described = json.loads((clone / "studies" / "local" / "steps" / "train" / "lenet.json").read_text())
    overrides = [word for word in described["overrides"] if not word.startswith("out=")]
    assert run_module(clone, "pipeline.train", *overrides, "out=by_hand", root=clone).returncode == 0
    runs = Run(clone / "studies" / "local" / "runs" / "lenet"), Run(clone / "by_hand")
    digests = {run.result()["checkpoint_sha256"] for run in runs}
    assert len(digests) == 1, "a step has the bits of the command by hand"


@pytest.mark.usefixtures("slurm")
def test_the_same_study_on_slurm(clone: Path) -> None:
    words = (*STUDY, "name=slurm", "profile=slurm", "~profile.resources", "+profile.resources={}", "--", *SOON, *SMALL)
    answer = run_module(clone, "pipeline.workflow", *words, root=clone)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert set(ran_steps(answer)) == ALL
    assert compared(clone / "studies" / "slurm") == set(NAMES)
