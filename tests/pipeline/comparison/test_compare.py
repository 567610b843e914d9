"""Trained runs side by side, from their files alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from statsmodels.stats.contingency_tables import mcnemar

from pipeline import compare as compare_verb
from pipeline.cli.errors import ConfigError
from pipeline.comparison.runs import ComparedRun, find_pareto_front, rank_runs
from pipeline.evaluate import __main__ as evaluate_verb
from tests.support.commands import MINE, Typed, call_verb, typed


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, lenet_root: Path) -> Path:
    """A folder with the run `mine`, evaluated, its longer copy `other`, and `fresh`, which was not evaluated."""
    root = tmp_path_factory.mktemp("compared") / "work"
    shutil.copytree(lenet_root, root)
    from pipeline.train import __main__ as train_verb

    words = [word for word in MINE if not word.startswith(("name=", "recipe.epochs="))]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        call_verb(train_verb.VERB, train_verb.main, [*words, "recipe.epochs=6", "name=other"])
        for name in ("mine", "other"):
            call_verb(evaluate_verb.VERB, evaluate_verb.main, [f"run={name}", "mlflow=false", "device=cpu"])
    shutil.copytree(root / "runs" / "mine", root / "runs" / "fresh")
    shutil.rmtree(root / "runs" / "fresh" / "evaluation")
    (root / "runs" / "fresh" / "mlflow_run_id").unlink()
    return root


@pytest.fixture
def compare(evaluated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Run `python -m pipeline.compare ...` in the folder of `evaluated`."""
    monkeypatch.chdir(evaluated)
    return typed(compare_verb.VERB, compare_verb.main, capsys)


def test_a_comparison_has_the_numbers_of_the_runs_files(compare: Typed, evaluated: Path) -> None:
    printed = compare("runs=[mine,other]", "mlflow=false")
    assert "wrote comparison/index.html, comparison/comparison.parquet, comparison/comparison.json\n" in printed
    numbers = json.loads((evaluated / "comparison" / "comparison.json").read_text())
    assert (numbers["split"], [run["name"] for run in numbers["runs"]]) == ("val", ["other", "mine"])
    right = {}
    for run, epochs in zip(numbers["runs"], (6, 2), strict=True):
        folder = evaluated / "runs" / run["name"]
        evaluation = json.loads((folder / "evaluation" / "val" / "evaluation.json").read_text())
        assert run["top1"] == evaluation["metrics"]["top1"]
        assert [run["top1_low"], run["top1_high"]] == evaluation["intervals_95"]["top1"]
        assert (run["images"], run["epochs"], run["dataset"]) == (359, epochs, "digits")
        state = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
        assert run["parameters"] == sum(tensor.numel() for tensor in state.values())
        # LeNet-5 on 32 pixels: 5 -> 6 -> 14 -> 16 by kernels of 5, 2, 5, 2; the linear layers depend on all of it.
        assert (run["receptive_field"], 0 < run["hours"] < 0.1, run["images_per_second"] > 10) == (32.0, True, True)
        table = pq.read_table(folder / "evaluation" / "val" / "predictions.parquet")
        right[run["name"]] = table.column("right").to_numpy()
    (pair,) = numbers["neighbours"]
    both = [[int((right["other"] == a)[right["mine"] == b].sum()) for b in (True, False)] for a in (True, False)]
    assert (pair["right_better_alone"], pair["right_worse_alone"]) == (both[0][1], both[1][0])
    assert pair["mcnemar_p"] == pytest.approx(mcnemar(both, exact=True).pvalue)
    only = f"other alone is right on {both[0][1]} images, mine alone on {both[1][0]}"
    assert f"{only} (McNemar's exact test, p = {pair['mcnemar_p']:.2g})\n" in printed
    table = pq.read_table(evaluated / "comparison" / "comparison.parquet")
    assert table.to_pylist() == numbers["runs"]
    page = (evaluated / "comparison" / "index.html").read_text()
    assert "2 runs side by side" in page
    assert page.count("<svg") == 3
    assert f'<data id="top1-1" value="{numbers["runs"][0]["top1"]:.12g}">' in page


def test_without_an_evaluation_of_all_runs_top1_is_that_of_the_training(compare: Typed, evaluated: Path) -> None:
    compare("runs=[mine,fresh]", "mlflow=false", "out=unequal")
    numbers = json.loads((evaluated / "unequal" / "comparison.json").read_text())
    assert (numbers["split"], numbers["neighbours"]) == (None, [])
    for run in numbers["runs"]:
        result = json.loads((evaluated / "runs" / run["name"] / "result.json").read_text())
        assert (run["top1"], run["top1_low"]) == (result["val/top1"], None)


def test_a_comparison_is_the_parent_of_its_runs_in_mlflow(compare: Typed, evaluated: Path) -> None:
    for _ in range(2):
        printed = compare("runs=[mine,other,fresh]", "out=parent")
    assert "in MLflow: fresh is not in sqlite:///" in printed
    assert "in MLflow: none of these runs is in sqlite:///" in compare("runs=[fresh]", "out=alone")
    client = MlflowClient(f"sqlite:///{evaluated / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("convoy")
    assert experiment is not None
    pages = {page.info.run_name: page for page in client.search_runs([experiment.experiment_id])}
    assert set(pages) == {"mine", "other", "comparison"}
    parent = pages["comparison"]
    assert parent.info.status == "FINISHED"
    assert {pages[name].data.tags["mlflow.parentRunId"] for name in ("mine", "other")} == {parent.info.run_id}
    artifacts = [artifact.path for artifact in client.list_artifacts(parent.info.run_id, "comparison")]
    assert artifacts == [f"comparison/{name}" for name in ("comparison.json", "comparison.parquet", "index.html")]
    compare("runs=[other]", "out=parent")
    tags = [client.get_run(pages[name].info.run_id).data.tags for name in ("mine", "other")]
    assert ["mlflow.parentRunId" in one for one in tags] == [False, True], "a comparison has only its own runs"
    client.set_tag(pages["mine"].info.run_id, "mlflow.parentRunId", pages["other"].info.run_id)
    compare("runs=[mine,other]", "out=parent")
    kept = client.get_run(pages["mine"].info.run_id).data.tags["mlflow.parentRunId"]
    assert kept == pages["other"].info.run_id, "the parent that a user has set"
    client.set_tag(pages["mine"].info.run_id, "mlflow.parentRunId", "0" * 32)
    assert "in MLflow" not in compare("runs=[mine,other]", "out=parent")
    tags = client.get_run(pages["mine"].info.run_id).data.tags
    assert tags["mlflow.parentRunId"] == parent.info.run_id, "in place of a parent that is gone"
    client.delete_run(pages["mine"].info.run_id)
    assert "in MLflow: mine, fresh are not in sqlite:///" in compare("runs=[mine,other,fresh]", "out=parent")
    client.restore_run(pages["mine"].info.run_id)
    best = max(run["top1"] for run in json.loads((evaluated / "parent" / "comparison.json").read_text())["runs"])
    assert parent.data.metrics == {"best/top1": best}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"a comparison needs either runs=\[RUN,RUN\] or study=NAME"),
        (["runs=[mine]", "study=two"], r"a comparison needs either runs=\[RUN,RUN\] or study=NAME"),
        (["runs=[mine,minne]"], "runs=minne is not one of the 3 runs in runs: did you mean mine?"),
        (["runs=[mine,runs/mine]"], "runs: runs/mine is named twice"),
        (["runs=[mine,fresh]", "split=val"], "split=val: runs/fresh has no evaluation on it: python -m pipeline.eval"),
        (["study=two"], "study=two has no studies/two/study.yaml: python -m pipeline.workflow writes it"),
    ],
)
def test_a_mistake_is_one_sentence(compare: Typed, words: list[str], message: str) -> None:
    with pytest.raises((ConfigError, ValueError, FileNotFoundError), match=message):
        compare(*words, "mlflow=false")


@pytest.mark.parametrize("field", ["weights_sha256", "split_digest"])
def test_an_evaluation_of_other_weights_or_images_is_not_used(compare: Typed, evaluated: Path, field: str) -> None:
    stale = shutil.copytree(evaluated / "runs" / "other", evaluated / "runs" / f"stale-{field}")
    file = stale / "evaluation" / "val" / "evaluation.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: "0" * 64}))
    with pytest.raises(ValueError, match=f"runs/{stale.name} has no evaluation on it"):
        compare(f"runs=[mine,{stale.name}]", "split=val", "mlflow=false")
    assert "different images" not in compare(f"runs=[mine,{stale.name}]", "mlflow=false", "out=stale")
    assert json.loads((evaluated / "stale" / "comparison.json").read_text())["split"] is None
    prints = stale / "fingerprint.json"
    prints.write_text(
        json.dumps(json.loads(prints.read_text()) | {"digest of train": "0" * 64, "digest of val": "1" * 64})
    )
    printed = compare(f"runs=[mine,{stale.name}]", "mlflow=false", "out=stale")
    for used in ("evaluated", "trained"):
        assert f"{used} on different images: mine; {stale.name}\n" in printed
    page = (evaluated / "stale" / "index.html").read_text()
    assert "The training images of these runs differ." in page
    assert "Top-1 is on different images, so it does not rank these runs." in page
    shutil.rmtree(stale)


def test_an_unfinished_run_is_refused(compare: Typed, evaluated: Path) -> None:
    cut = shutil.copytree(evaluated / "runs" / "mine", evaluated / "runs" / "cut")
    (cut / "result.json").unlink()
    try:
        with pytest.raises(ValueError, match="runs/cut has not finished: train it to its end, or leave it out"):
            compare("runs=[cut]", "mlflow=false")
    finally:
        shutil.rmtree(cut)


def run_of(name: str, top1: float | None, gmacs: float) -> ComparedRun:
    return ComparedRun(
        name, name, "net", "data", "digest", "digest", 32, top1, None, None, 1, gmacs, None, None, 1, 0.0, {}
    )


@given(st.lists(st.tuples(st.sampled_from([None, 0.1, 0.5, 0.5, 0.9]), st.integers(1, 4)), min_size=1, max_size=8))
def test_the_pareto_front_is_what_no_other_run_beats(points: list[tuple[float | None, int]]) -> None:
    runs = rank_runs([run_of(str(number), top1, float(cost)) for number, (top1, cost) in enumerate(points)])
    front = find_pareto_front(runs, [run.gmacs for run in runs])
    known = [run for run in runs if run.top1 is not None]

    def beats(one: ComparedRun, other: ComparedRun) -> bool:
        better, cheaper = (one.top1 or 0, -one.gmacs), (other.top1 or 0, -other.gmacs)
        return better != cheaper and all(mine >= its for mine, its in zip(better, cheaper, strict=True))

    unbeaten = [run for run in known if not any(beats(other, run) for other in known)]
    assert {(run.top1, run.gmacs) for run in unbeaten} == {(run.top1, run.gmacs) for run in known if run.name in front}
