"""From a study to its steps: names, commands, what each needs, and mistakes."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cli.errors import ConfigError
from pipeline.engines.study import Step, build_steps
from tests.support.paths import ROOT

FOLDER = Path("studies/mine")
DATA = {"pets": {"pack": ["source=folder", "source.root=photos"]}}


def study_of(**changes: Any) -> dict[str, Any]:  # noqa: ANN401  # parts of a study are trees
    return {"data": DATA, "train": {"runs": {"resnet": ["+model=resnet"]}}, **changes}


def steps_of(**changes: Any) -> dict[str, Step]:  # noqa: ANN401  # parts of a study are trees
    return {step.identity: step for step in build_steps(study_of(**changes), FOLDER)}


def test_the_study_of_the_documentation_has_its_steps() -> None:
    text = (ROOT / "docs" / "workflow.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    found = build_steps(yaml.safe_load(example), FOLDER)
    counts = Counter(step.verb for step in found)
    assert counts == {"pack": 1, "train": 4, "evaluate": 4, "export": 4, "compare": 1}


@pytest.mark.parametrize("word", ["out=here", "run=latest", "++again=refuse"])
def test_keys_that_the_study_sets_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=rf"^study\.evaluate\.val: {re.escape(word)} is set by the study"):
        steps_of(evaluate={"val": [word]})


def test_every_step_names_its_command_its_needs_and_its_result() -> None:
    after = {"evaluate": {"test": ["split=test"]}, "report": {"fields": []}, "export": {"onnx": ["format=onnx"]}}
    found = steps_of(**after, compare=["split=test"])
    root, run = "studies/mine", "studies/mine/runs/resnet"
    assert found == {
        step.identity: step
        for step in (
            Step("pack", "pets", ("source=folder", "source.root=photos", "name=pets", f"out={root}/data/pets"), (),
                 FOLDER / "data/pets/dataset.json"),
            Step("train", "resnet", ("data=shards", f"data.root={root}/data/pets", "+model=resnet", f"out={run}",
                 "again=replace"), ("pack/pets",), Path(run) / "result.json"),
            Step("evaluate", "resnet/test", ("split=test", f"run={run}", f"out={run}/evaluation/test"),
                 ("train/resnet",), Path(run) / "evaluation/test/evaluation.json"),
            Step("report", "resnet/fields", (f"run={run}", f"out={run}/reports/fields"), ("train/resnet",),
                 Path(run) / "reports/fields/report.json"),
            Step("export", "resnet/onnx", ("format=onnx", f"run={run}", f"out={run}/exports/onnx"), ("train/resnet",),
                 Path(run) / "exports/onnx/export.json"),
            Step("compare", "all", ("split=test", f"runs=[{run}]", f"out={root}/comparison"),
                 ("train/resnet", "evaluate/resnet/test", "report/resnet/fields"),
                 FOLDER / "comparison/comparison.json"),
        )
    }  # fmt: skip


def test_a_run_may_choose_again_what_all_runs_have() -> None:
    data = {"pets": {"root": "pets", "train": ["data=cifar10", "augment=small"]}}
    runs = {"one": ["+model=lenet", "policy=none", "+trainer.max_steps=3"], "two": ["+model=vgg", "data=shards"]}
    train = {"overrides": ["policy=trivial", "+trainer.max_steps=2"], "runs": runs}
    found = steps_of(data=data, train=train)
    place, index = "data.root=pets", "data.index=studies/mine/data/pets"
    chosen = {name: found[f"train/{name}"].overrides[:-2] for name in runs}
    assert chosen["one"] == (
        *("data=cifar10", "augment=small", place, index, "+trainer.max_steps=2", "+model=lenet", "policy=none"),
        "+trainer.max_steps=3",
    )
    assert chosen["two"] == (
        *("augment=small", place, index, "policy=trivial", "+trainer.max_steps=2", "+model=vgg", "data=shards"),
    )


def test_a_grid_may_nest_its_keys() -> None:
    runs = {"a": ["+model=lenet"]}
    nested, flat = {"recipe": {"optimizer": {"lr": [0.1, 0.2]}}}, {"recipe.optimizer.lr": [0.1, 0.2]}
    assert steps_of(train={"runs": runs, "grid": nested}) == steps_of(train={"runs": runs, "grid": flat})
    assert len(steps_of(train={"runs": runs, "grid": flat})) == 3


def test_a_grid_names_runs_by_lists_too() -> None:
    found = steps_of(train={"runs": {"a": ["+model=lenet"]}, "grid": {"augment.training.scale": [[0.5, 1], [0.6, 1]]}})
    assert [name for name in found if name.startswith("train/")] == ["train/a-scale0.5-1", "train/a-scale0.6-1"]
    assert "augment.training.scale=[0.5, 1]" in found["train/a-scale0.5-1"].overrides


def test_a_grid_multiplies_every_run_and_names_what_differs() -> None:
    train = {
        "overrides": ["recipe.epochs=2"],
        "runs": {"resnet": ["+model=resnet"], "vgg": {"overrides": ["+model=vgg"], "weights": "resnet"}},
        "grid": {"model.variant": ["small", "large"], "recipe.optimizer.lr": [0.1, 0.01]},
    }
    found = steps_of(train=train)
    points = [f"{size}-lr{rate}" for size in ("small", "large") for rate in (0.1, 0.01)]
    assert [name for name in found if name.startswith("train/")] == [
        *(f"train/resnet-{point}" for point in points), *(f"train/vgg-{point}" for point in points)
    ]  # fmt: skip
    last = found["train/vgg-large-lr0.01"]
    assert last.needs == ("pack/pets", "train/resnet-large-lr0.01")
    assert "weights=studies/mine/runs/resnet-large-lr0.01/checkpoints/best.ckpt" in last.overrides
    common, own, size, rate = (last.overrides.index(word) for word in (
        "recipe.epochs=2", "+model=vgg", "model.variant=large", "recipe.optimizer.lr=0.01"))  # fmt: skip
    assert common < own < size < rate, "the more particular one must win"


def test_parts_are_steps_before_the_data_set(tmp_path: Path) -> None:
    for described, verb in (({"pack": ["source=digits"]}, "pack"), ({"root": str(tmp_path)}, "index")):
        found = steps_of(data={"pets": described | {"parts": 3}})
        parts = [f"{verb}/pets@{number}of3" for number in (1, 2, 3)]
        assert list(found) == [*parts, f"{verb}/pets", "train/resnet"]
        assert [found[one].overrides[-1] for one in parts] == ["part=1/3", "part=2/3", "part=3/3"]
        assert found[f"{verb}/pets"].needs == tuple(parts)
        assert found[f"{verb}/pets"].overrides[-1] == "part=merge"
        assert found["train/resnet"].needs == (f"{verb}/pets",)
        alone = steps_of(data={"pets": described | {"parts": 1}})
        assert alone == steps_of(data={"pets": described})


def test_a_data_set_that_is_packed_needs_no_step_and_foreign_tars_an_index(tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "dataset.json").touch()
    data = {"packed": {"root": str(tmp_path / "packed")}, "foreign": {"root": "tars", "train": ["data=cifar10"]}}
    runs = {"one": ["+model=resnet"], "other": {"overrides": ["+model=resnet"], "data": "foreign"}}
    found = steps_of(data=data, train={"runs": runs})
    assert set(found) == {"index/foreign", "train/one", "train/other"}
    assert found["index/foreign"].overrides == ("root=tars", "out=studies/mine/data/foreign")
    assert found["train/one"].needs == ()
    assert found["train/one"].overrides[:2] == ("data=shards", f"data.root={tmp_path / 'packed'}")
    expected = ("data=cifar10", "data.root=tars", "data.index=studies/mine/data/foreign")
    assert found["train/other"].overrides[:3] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trian": {}}, "study has no trian, it takes data, train, .*: did you mean train?"),
        ({"data": {}}, "study.data is empty: name a data set"),
        (
            {"train": {"runs": {"a": ["+model=lenet", "policy=trivial", "policy=jitter"]}}},
            r"study.train.runs.a.overrides chooses policy twice: its options are alternatives",
        ),
        ({"data": {"pets": {}}}, r"study.data.pets needs either pack=\[source=...\] or root=FOLDER"),
        ({"data": {"pets": {"rooot": "x"}}}, "study.data.pets has no rooot, it takes .*: did you mean root?"),
        ({"data": {"a/b": {"root": "x"}}}, "study.data.a/b: a/b cannot name a folder"),
        ({"data": {"pets": {"root": "x", "parts": 0}}}, "study.data.pets.parts=0 must be an integer of at least 1"),
        ({"train": {"runs": {}}}, "study.train.runs is empty: name a run"),
        ({"train": {"runs": {"a": "+model=x"}}}, r"study.train.runs.a=\+model=x must be a list of over"),
        ({"train": {"runs": {"a": ["model"]}}}, "study.train.runs.a.overrides=.* must be a list of overrides"),
        ({"train": {"runs": {"a": {"data": "petz"}}}}, "study.train.runs.a.data=petz is not one of pets: did you mean"),
        ({"train": {"runs": {"a": {"weights": "b"}}}}, "study.train.runs.a.weights=b is not one of its runs"),
        (
            {"train": {"runs": {"a": {"weights": "b"}, "b": {"weights": "a"}}}},
            "study.train: these runs start from each other's weights: [ab], [ab], [ab]",
        ),
        (
            {"train": {"runs": {"a": []}, "grid": {"seed": []}}},
            r"study.train.grid.seed=\[\] must be a list of at least",
        ),
        (
            {"train": {"runs": {"a": [], "b": {"weights": "a", "overrides": ["weights=file.pt"]}}}},
            "study.train.runs.b has two weights: those of the run a, and a file",
        ),
        ({"train": {"runs": {"a": []}, "grid": {"seed": [1, 1]}}}, "study.train has two runs of the name a-seed1"),
        ({"train": {"runs": {"a": [], "a-seed1": []}, "grid": {"seed": [1]}}}, None),
        ({"evaluate": {"../x": []}}, "study.evaluate: ../x cannot name a folder"),
        ({"evaluate": {"val": ["+trust=true"]}}, "study.evaluate.val: trust in a study does not count"),
        ({"train": {"runs": {"a": ["trust=True"]}}}, "study.train.runs.a.overrides: trust in a study does not count"),
        ({"compare": "yes"}, "study.compare=yes must be a list of overrides"),
    ],
)
def test_a_mistake_in_a_study_is_one_sentence(changes: dict[str, Any], message: str | None) -> None:
    if message is None:
        steps_of(**changes)
        return
    with pytest.raises(ConfigError, match=message):
        steps_of(**changes)
