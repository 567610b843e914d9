"""Data sets of a study, and mistakes that are named before anything runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data.shards.dataset import Dataset
from tests.support.commands import ran_steps, run_module
from tests.support.small_study import STUDY

pytestmark = pytest.mark.engines


PARTS = """
data:
  digits: {pack: [source=digits, shard_samples=200], parts: 3, train: [data=digits]}
train: {runs: {lenet: [+model=lenet, tracking=none, recipe.epochs=1, +trainer.limit_train_batches=1]}}
"""


def test_a_data_set_is_packed_in_parts(project: Path) -> None:
    (project / "conf" / "study" / "parts.yaml").write_text(PARTS)
    command = ("pipeline.workflow", "+study=parts", "jobs=2")
    first = run_module(project / "work", *command, "--", "studies/parts/done/pack/digits@1of3", root=project)
    assert ran_steps(first) == ["pack/digits@1of3"], first.stdout + first.stderr
    answer = run_module(project / "work", *command, root=project)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert ran_steps(answer) == ["pack/digits", "pack/digits@2of3", "pack/digits@3of3", "train/lenet"]
    folder = project / "work" / "studies" / "parts"
    manifest = json.loads((folder / "data" / "digits" / "dataset.json").read_text())
    assert len(manifest["splits"]["train"]["shards"]) == 8
    assert sorted(path.name for path in (folder / "logs" / "pack").iterdir()) == [
        "digits.log", "digits@1of3.log", "digits@2of3.log", "digits@3of3.log",
    ]  # fmt: skip
    assert "3/3: 3 tars" in (folder / "logs" / "pack" / "digits@3of3.log").read_text()
    assert not ran_steps(run_module(project / "work", *command, root=project))
    different = "study.data.digits.pack=[source=digits,shard_samples=300]"
    target = ("--", "studies/parts/done/pack/digits")
    changed = run_module(project / "work", *command, different, *target, root=project)
    assert changed.returncode == 0, changed.stdout + changed.stderr
    assert set(ran_steps(changed)) == {"pack/digits", *(f"pack/digits@{number}of3" for number in (1, 2, 3))}
    manifest = json.loads((folder / "data" / "digits" / "dataset.json").read_text())
    assert len(manifest["splits"]["train"]["shards"]) == 5
    assert (folder / "data" / "digits-replaced-1" / "dataset.json").is_file()
    missing = run_module(project / "work", *command, different, "dry_run=true", root=project)
    assert missing.stdout == "train/lenet  after pack/digits\n1 of 5 steps would run\n"


def test_a_changed_folder_of_tars_is_indexed_again(project: Path, photographs: Dataset) -> None:
    work = project / "work"
    for name in ("a", "b"):
        (work / name).mkdir()
    for number, tar in enumerate(sorted(photographs.root.glob("*.tar"))):
        for name in ("a", "b"):
            shutil.copy(tar, work / name / f"{tar.stem.split('-')[0]}-{name}{number}.tar")
    study = "{data: {tars: {root: a}}, train: {runs: {lenet: [+model=lenet, tracking=none]}}}"
    (project / "conf" / "study" / "tars.yaml").write_text(study)
    command = ("pipeline.workflow", "+study=tars")
    for root in ("a", "b"):
        answer = run_module(work, *command, f"study.data.tars.root={root}", "--", "--until", "index", root=project)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        assert ran_steps(answer) == ["index/tars"]
    folder = work / "studies" / "tars" / "data"
    assert "train-a" in (folder / "tars-replaced-1" / "dataset.json").read_text()
    assert "train-b" in (folder / "tars" / "dataset.json").read_text()


def test_a_study_cannot_change_the_commands_of_a_profile(project: Path) -> None:
    indented = STUDY.replace("\n", "\n  ")
    profile = "profile: {prefix: {train: touch ran;}}"
    evil = f"# @package _global_\n{profile}\nstudy:{indented}"
    file = project / "conf" / "study" / "evil.yaml"
    file.write_text(evil)
    answer = run_module(project / "work", "pipeline.workflow", "+study=evil", root=project)
    file.unlink()
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: the study changes the profile, which does not count")
    assert not (project / "work" / "ran").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+study=toy"], "error: study=toy is not one of digits, "),
        (["study.train.runs.bad=[+model=resnet18]"], "error: train/bad: model=resnet18 is not one of "),
        (
            ["study.train.overrides=[+model=lenet,recipe.epochs=-1]"],
            "error: train/good: recipe.epochs=-1 must be an integer of at least 1",
        ),
        (
            ["study.data.digits.pack=[source=digits,val_fraction=2]"],
            "error: pack/digits: val_fraction=2 must be at least 0 and less than 1",
        ),
        (
            ["study.data.digits.pack=[source=folder,source.root=none]"],
            "error: pack/digits: source.root=none does not exist",
        ),
        (
            ["study.train.overrides=[+model=lenet,data.image_size=31]"],
            "error: train/good: data.image_size=31 must be 28 or 32 pixels for LeNet-5",
        ),
        (
            ["profile.prefix.train=torchrn --nproc-per-node=2"],
            "error: profile.prefix.train=torchrn --nproc-per-node=2: there is no program torchrn",
        ),
        (
            ["profile=kubernetes", "profile.image=a", "profile.claim=c", "profile.nodes=0", "dry_run=true"],
            "error: profile.nodes=0 must be at least 1",
        ),
        (
            ["profile=kubernetes", "profile.image=a", "profile.claim=c", "profile.kind=Job", "dry_run=true"],
            "error: argument profile.kind: invalid choice: 'Job' (choose from 'trainjob', 'jobset')\n",
        ),
        (["--", "train/goood"], "error: there is no step train/goood: did you mean train/good?"),
        (
            ["study.train.overrides=[+model=lenet,weights=missing.pt]"],
            "error: train/good: weights.file=missing.pt does not exist",
        ),
        (["study.evaluate.val=[split=tset]"], "error: evaluate/good/val: split=tset is not one of train, val, test"),
        (["study.export.weights=[format=onx]"], "error: export/good/weights: format=onx is not one of onnx, "),
        (["+study.report.all=[layers=every]"], "error: report/good/all: layers=every is not one of some, all, none"),
        (["graph=steps.pdf"], "error: graph=steps.pdf must end in one of .dot, .png, .svg"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_runs(project: Path, words: list[str], message: str) -> None:
    given = words if words[0].startswith("+study=") else ["+study=two", *words]  # before --
    answer = run_module(project / "work", "pipeline.workflow", "name=wrong", *given, root=project)
    assert answer.returncode == 1
    assert answer.stderr.startswith(message)
    assert answer.stderr.count("\n") == 1
    assert not [path for path in (project / "work").glob("studies/wrong/*") if path.name != ".lock"]
