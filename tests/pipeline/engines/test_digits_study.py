"""The study of nine architectures on this machine; test_slurm.py has it on Slurm, with a network of each family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.runs.run import Run
from tests.support.commands import ran_steps, run_module
from tests.support.digits_study import NAMES, STUDY, compared, steps_of, without_others

pytestmark = pytest.mark.engines

FAILS = "study.train.runs.resnet=[+model=resnet,recipe.optimizer.lr=1e30]"
OF_RESNET = {"train/resnet", "evaluate/resnet/val", "compare/all"}


@pytest.mark.parametrize(
    "names", [("lenet", "resnet"), pytest.param(NAMES, marks=pytest.mark.soak)], ids=["two", "all"]
)
def test_a_study_that_fails_once(clone: Path, names: tuple[str, ...]) -> None:
    words = ("pipeline.workflow", *STUDY, *without_others(names), "name=local", "jobs=2")
    failed = run_module(clone, *words, FAILS, root=clone)
    assert failed.returncode == 2, failed.stdout + failed.stderr
    assert set(ran_steps(failed)) == steps_of(names) - OF_RESNET | {"train/resnet!"}
    again = run_module(clone, *words, root=clone)
    assert again.returncode == 0, again.stdout + again.stderr
    assert set(ran_steps(again)) == OF_RESNET
    assert compared(clone / "studies" / "local") == set(names)

    described = json.loads((clone / "studies" / "local" / "steps" / "train" / "lenet.json").read_text())
    overrides = [word for word in described["overrides"] if not word.startswith("out=")]
    assert run_module(clone, "pipeline.train", *overrides, "out=by_hand", root=clone).returncode == 0
    runs = Run(clone / "studies" / "local" / "runs" / "lenet"), Run(clone / "by_hand")
    digests = {run.result()["checkpoint_sha256"] for run in runs}
    assert len(digests) == 1, "a step has the bits of the command by hand"
