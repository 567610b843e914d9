"""The verb `evaluate`: its files against scikit-learn, any number of ranks, its page in MLflow, its mistakes."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn import metrics

from data.loading.loader import Batch
from data.shards.dataset import Dataset
from data.shards.images import UnreadableImage
from data.shards.manifest import read_manifest
from pipeline import load
from pipeline.evaluate import __main__ as verb
from pipeline.evaluate import forward
from tests.support.commands import FinishedRun, Typed, run_module, typed
from tests.support.paths import ROOT
from tests.support.saving import replace_checkpoint

FILES = ("index.html", "predictions.parquet", "evaluation.json")


@pytest.fixture
def evaluate(main_job: FinishedRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Run `python -m pipeline.evaluate ...` in the folder of a finished run."""
    monkeypatch.chdir(main_job.root)
    return typed(verb.VERB, verb.main, capsys)


def numbers_in(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "evaluation.json").read_text()))


def test_numbers_page_and_table_agree_with_scikit_learn_and_the_dashboard(
    evaluate: Typed, main_job: FinishedRun
) -> None:
    printed = evaluate("run=latest")
    folder = main_job.folder / "evaluation" / "val"
    assert sorted(file.name for file in folder.iterdir()) == sorted(FILES)
    found, table = numbers_in(folder), pq.read_table(folder / "predictions.parquet").to_pydict()
    classes = [row["class"] for row in found["classes"]]
    model = load(main_job.folder)
    assert classes == list(model.classes)
    right, predicted = table["class"], table["predicted"]
    assert found["images"] == len(right) == 359
    assert found["metrics"]["top1"] == pytest.approx(metrics.accuracy_score(right, predicted), abs=1e-9)
    assert found["metrics"]["f1_macro"] == pytest.approx(metrics.f1_score(right, predicted, average="macro"), abs=1e-9)
    assert found["metrics"]["loss"] == pytest.approx(np.mean(table["loss"]), abs=1e-9)
    recall = metrics.recall_score(right, predicted, average=None, labels=classes)
    assert [row["recall"] for row in found["classes"]] == pytest.approx(recall.tolist(), abs=1e-9)
    low, high = found["intervals_95"]["top1"]
    assert low < found["metrics"]["top1"] < high
    assert f"top-1       {found['metrics']['top1']:.1%} (95 %: {low:.1%} to {high:.1%})" in printed
    page = (folder / "index.html").read_text()
    assert f'<data id="top1" value="{found["metrics"]["top1"]:.12g}">' in page
    assert "fitted on these same images" in page
    assert page.count("data:image/jpeg;base64,") == 24
    client, run = main_job.in_mlflow()
    assert run.data.metrics["evaluation/val/f1_macro"] == pytest.approx(found["metrics"]["f1_macro"])
    error = found["calibration"]["expected_calibration_error"]
    assert run.data.metrics["evaluation/val/calibration_error"] == pytest.approx(error)
    stored = [one.path for one in client.list_artifacts(run.info.run_id, "evaluation/val")]
    assert stored == [f"evaluation/val/{name}" for name in sorted(FILES)]
    assert run.info.status == "FINISHED"


def test_every_image_is_answered_as_predict_does(evaluate: Typed, main_job: FinishedRun, tmp_path: Path) -> None:
    evaluate("run=latest", f"out={tmp_path}", "mlflow=false")
    table = pq.read_table(tmp_path / "predictions.parquet").to_pydict()
    model = load(main_job.folder)  # with the temperature that was just fitted
    dataset = model.run.open_dataset()
    from data.loading.inputs import find_images

    shards = sorted({f"{dataset.root}/{shard}" for shard in table["shard"]})
    predictions = [one for shard in shards for one in model.predict_sources(find_images(shard, lines=sys.stdin))]
    assert [one.label for one in predictions] == table["predicted"]
    assert [one.probability for one in predictions] == pytest.approx(table["probability"], abs=1e-5)
    assert [one.is_unsure for one in predictions] == table["unsure"]


@pytest.mark.faults
def test_three_ranks_find_the_same_numbers(evaluate: Typed, main_job: FinishedRun, tmp_path: Path) -> None:
    evaluate("run=latest", f"out={tmp_path / 'one'}", "mlflow=false", "batch_size=50")
    launch = ("torch.distributed.run", "--standalone", "--nproc-per-node=3", "-m", "pipeline.evaluate")
    words = ("run=latest", f"out={tmp_path / 'several'}", "mlflow=false", "batch_size=50")
    answer = run_module(main_job.root, *launch, *words)
    assert answer.returncode == 0, answer.stderr
    one, several = ((tmp_path / name / "evaluation.json").read_bytes() for name in ("one", "several"))
    assert one == several
    assert answer.stdout.count("top-1") == 1


def test_two_runs_are_compared_on_the_same_images(evaluate: Typed, main_job: FinishedRun, tmp_path: Path) -> None:
    printed = evaluate("run=latest", f"versus={main_job.folder}", f"out={tmp_path}", "mlflow=false")
    assert f"versus      {main_job.folder.name}" in printed
    assert numbers_in(tmp_path)["versus"]["right_here_alone"] == 0
    assert pq.read_table(tmp_path / "predictions.parquet").column("versus_right").to_pylist()
    assert 'id="section-comparison"' in (tmp_path / "index.html").read_text()


def test_classes_in_another_order_are_matched_by_name(evaluate: Typed, main_job: FinishedRun, tmp_path: Path) -> None:
    root = shutil.copytree(main_job.root / "datasets" / "digits", tmp_path / "turned")
    manifest = json.loads((root / "dataset.json").read_text())
    manifest["classes"] = manifest["classes"][::-1]  # label 0 is now the class 9
    del manifest["digest"]
    (root / "dataset.json").write_text(json.dumps(manifest))
    assert read_manifest(root, root).classes[0] == "9"
    evaluate("run=latest", f"out={tmp_path / 'straight'}", "mlflow=false")
    evaluate("run=latest", f"data={root}", f"out={tmp_path / 'turned-out'}", "mlflow=false")
    tables = [pq.read_table(tmp_path / name / "predictions.parquet").to_pydict() for name in ("straight", "turned-out")]
    assert tables[0]["predicted"] == tables[1]["predicted"]
    assert [str(9 - int(one)) for one in tables[0]["class"]] == tables[1]["class"]


def test_larger_images_are_tried_and_the_best_size_is_taken(
    evaluate: Typed, main_job: FinishedRun, tmp_path: Path
) -> None:
    evaluate("run=latest", "size=auto", f"out={tmp_path}", "mlflow=false")
    found = numbers_in(tmp_path)
    assert list(found["sizes"]) == ["16", "18", "21", "23"]
    assert found["sizes"][str(found["image_size"])] == max(found["sizes"].values()) == found["metrics"]["top1"]


def test_a_threshold_keeps_its_promise_on_the_images_it_was_fitted_on(
    evaluate: Typed, main_job: FinishedRun, tmp_path: Path
) -> None:
    evaluate("run=latest", "precision=0.8", f"out={tmp_path}", "mlflow=false")
    found, table = numbers_in(tmp_path)["calibration"], pq.read_table(tmp_path / "predictions.parquet").to_pydict()
    answered = ~np.array(table["unsure"])
    assert found["answered"] == pytest.approx(answered.mean())
    assert np.array(table["right"])[answered].mean() == pytest.approx(found["top1_of_answered"])
    assert found["top1_of_answered"] >= 0.8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run=nothing",), "run=nothing is not one of the 1 runs in runs"),
        (("run=latest", "split=test"), "split=test is not one of those of digits: train, val"),
        (("run=latest", "device=tpu"), "device=tpu is not cpu, cuda or cuda:NUMBER"),
        (("run=latest", "size=large"), "size=large is not auto, null, a number of pixels or [HEIGHT,WIDTH]"),
        (("run=latest", "precision=2"), "precision=2 must be a share above 0 and at most 1, such as 0.95"),
        (("run=latest", "batch_size=0"), "batch_size=0 must be an integer of at least 1"),
        (("run=latest", "data=nowhere"), "data=nowhere is not a folder: pack one with python -m pipeline.pack"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(evaluate: Typed, words: tuple[str, ...], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        evaluate(*words)


def test_foreign_classes_are_named(evaluate: Typed, photographs: Dataset) -> None:
    sentence = (
        "the run does not know the classes class0, class1, class2, ... of the data set: its own 10 are 0, 1, 2, ..."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        evaluate("run=latest", f"data={photographs.root}")


def test_the_verb_is_a_command(main_job: FinishedRun) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "pipeline.evaluate", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "python -m pipeline.evaluate run=latest" in answer.stdout


def test_weights_that_are_no_numbers_are_named(evaluate: Typed, main_job: FinishedRun, tmp_path: Path) -> None:
    run = shutil.copytree(main_job.folder, tmp_path / "runs" / "diverged")
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    checkpoint["state_dict"] = {
        name: value * float("nan") if "head" in name else value for name, value in checkpoint["state_dict"].items()
    }
    replace_checkpoint(run / "checkpoints" / "best.ckpt", checkpoint)
    for words in ((f"run={run}",), ("run=latest", f"versus={run}")):
        with pytest.raises(
            ValueError, match=r"best.ckpt: head.linear.weight has NaN or infinite values: its training has"
        ):
            evaluate(*words, "mlflow=false", f"out={tmp_path / 'out'}")


def test_other_weights_leave_the_calibration_of_the_best(
    evaluate: Typed, main_job: FinishedRun, tmp_path: Path
) -> None:
    run = shutil.copytree(main_job.folder, tmp_path / "runs" / "copied")
    evaluate(f"run={run}", "mlflow=false")
    before = (run / "evaluation" / "calibration.json").read_bytes()
    evaluate(f"run={run / 'checkpoints' / 'last.ckpt'}", "mlflow=false")
    assert (run / "evaluation" / "calibration.json").read_bytes() == before
    assert (run / "evaluation" / "val-last" / "evaluation.json").is_file()


def test_an_error_of_a_rank_is_gathered_as_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged() -> Iterator[Batch]:
        raise UnreadableImage("cannot be decoded: val-000000.tar: 7")
        yield

    found = forward._answer_share(SimpleNamespace(), damaged(), batch_size=4)
    assert isinstance(found, UnreadableImage)
    assert str(found) == "cannot be decoded: val-000000.tar: 7"
    assert pickle.loads(pickle.dumps(found)).args == found.args  # as it travels to the first rank
