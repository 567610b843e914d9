"""Whose images an evaluation uses: the run's own wherever they lie, changed ones, missing ones, other ones."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from data.shards.dataset import Dataset
from pipeline.evaluate import __main__ as verb
from tests.support.commands import FinishedRun, Typed, run_module, typed
from tests.support.saving import replace_checkpoint

LAUNCH = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pipeline.evaluate")


@pytest.fixture
def root(main_job: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of a finished run and of its data set."""
    shutil.copytree(main_job.folder, tmp_path / "runs" / "mine", ignore=shutil.ignore_patterns("evaluation"))
    shutil.copytree(main_job.root / "datasets", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def evaluate(root: Path, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Run `python -m pipeline.evaluate run=mine ...` there."""
    run = typed(verb.VERB, verb.main, capsys)
    return lambda *words: run("run=mine", "mlflow=false", *words)


def change_split(root: Path, split: str) -> None:
    """Add a shard to a split."""
    shutil.copy(root / f"{split}-000000.tar", root / f"{split}-000001.tar")


def without_source(run: Path) -> None:
    """Let a run have trained on shards that nothing can pack again."""
    config = run / "config.yaml"
    text = config.read_text().partition("\n")[2]  # without the digest
    config.write_text(re.sub(r"^  source: .*$", "  source: null", text, flags=re.MULTILINE))


def test_the_runs_data_calibrate_it_wherever_they_lie(evaluate: Typed, root: Path) -> None:
    evaluate()
    own = (root / "runs" / "mine" / "evaluation" / "calibration.json").read_bytes()
    shutil.rmtree(root / "runs" / "mine" / "evaluation")
    (root / "datasets" / "digits").rename(root / "moved")
    evaluate("data=moved")
    assert (root / "runs" / "mine" / "evaluation" / "calibration.json").read_bytes() == own
    assert (root / "runs" / "mine" / "evaluation" / "val" / "evaluation.json").is_file()


def test_changed_data_are_another_data_set(evaluate: Typed, root: Path) -> None:
    data, evaluation = root / "datasets" / "digits", root / "runs" / "mine" / "evaluation"
    change_split(data, "train")
    evaluate()  # its images are not used
    shutil.rmtree(evaluation)
    change_split(data, "val")
    sentence = "datasets/digits has changed since mine began (split val): data=datasets/digits evaluates it as another"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        evaluate()
    evaluate("data=datasets/digits")
    assert (evaluation / "val-digits" / "evaluation.json").is_file()
    assert not (evaluation / "calibration.json").exists()


def test_missing_data_are_packed_again_or_asked_for(evaluate: Typed, root: Path) -> None:
    shutil.rmtree(root / "datasets" / "digits")
    assert "packing digits into datasets/digits" in evaluate()
    shutil.rmtree(root / "datasets" / "digits")
    without_source(root / "runs" / "mine")
    with pytest.raises(
        FileNotFoundError, match=r"^mine was trained on datasets/digits, which does not exist: add data="
    ):
        evaluate()


def test_a_missing_split_is_named(evaluate: Typed, root: Path) -> None:
    (root / "datasets" / "digits" / "val-000000.tar").unlink()
    sentence = "=datasets/digits lacks val-000000.tar, listed in datasets/digits/dataset.json: restore it, or"
    for words in ((), ("data=datasets/digits",)):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            evaluate(*words)


def test_the_path_of_the_best_checkpoint_is_the_run(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed(verb.VERB, verb.main, capsys)("run=runs/mine/checkpoints/best.ckpt", "mlflow=false")
    assert (root / "runs" / "mine" / "evaluation" / "calibration.json").is_file()
    assert (root / "runs" / "mine" / "evaluation" / "val" / "evaluation.json").is_file()


def test_a_threshold_has_one_precision(evaluate: Typed, root: Path) -> None:
    evaluate("precision=0.8")
    shutil.copytree(root / "datasets" / "digits", root / "other")
    change_split(root / "other", "val")
    sentence = "the threshold of mine is fitted for precision=0.8: leave precision=0.9 out, or evaluate the run with it"
    with pytest.raises(ValueError, match=f"^{sentence}"):
        evaluate("data=other", "precision=0.9")
    for words in ((), ("precision=0.8",)):
        evaluate("data=other", "out=out", *words)
        assert json.loads((root / "out" / "evaluation.json").read_text())["calibration"]["precision"] == 0.8


def test_the_run_that_was_not_found_is_named_as_it_was_typed(evaluate: Typed) -> None:
    with pytest.raises(FileNotFoundError, match=r"^versus=mint is not one of the 1 runs in runs: did you mean mine\?$"):
        evaluate("versus=mint")


@pytest.mark.faults
@pytest.mark.parametrize("what", ["weights", "image", "name"])
def test_all_ranks_end_with_one_sentence(root: Path, photographs: Dataset, what: str) -> None:
    run, words = root / "runs" / "mine", ("run=mine", "mlflow=false", "batch_size=50")
    if what == "weights":
        import torch

        checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
        checkpoint["state_dict"] = {name: value * 1e37 for name, value in checkpoint["state_dict"].items()}
        replace_checkpoint(run / "checkpoints" / "best.ckpt", checkpoint)
    elif what == "name":
        words = ("run=mint",)
    else:
        tar = root / "datasets" / "digits" / "val-000000.tar"
        content = bytearray(tar.read_bytes())
        start = content.rindex(b"\xff\xd8\xff")  # of the last image, in rank 1's share or rank 0's
        content[start : start + 64] = bytes(64)
        times = tar.stat()
        tar.write_bytes(content)
        os.utime(tar, ns=(times.st_atime_ns, times.st_mtime_ns))  # else it is indexed again
    answer = run_module(root, *LAUNCH, *words)
    assert answer.returncode == 1
    errors = [line for line in answer.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, answer.stderr
    texts = {"weights": "gives NaN for 359 of 359 images", "image": "val-000000.tar", "name": "did you mean mine?"}
    assert texts[what] in errors[0]
    assert not (run / "evaluation").exists()


def test_images_that_cannot_be_read_are_named_when_they_are_indexed(evaluate: Typed, root: Path) -> None:
    shutil.copytree(root / "datasets" / "digits", root / "other", ignore=shutil.ignore_patterns("*.json", "*.parquet"))
    tar = root / "other" / "val-000000.tar"
    content = bytearray(tar.read_bytes())
    start = content.index(b"\xff\xd8\xff")
    content[start : start + 200] = bytes(200)
    tar.write_bytes(content)
    printed = evaluate("data=other")
    assert "1 skipped in all" in printed
    assert "on 358 images of split val of other" in printed


def test_a_precision_stays(evaluate: Typed, root: Path) -> None:
    evaluate("precision=0.8")
    evaluate()
    found = json.loads((root / "runs" / "mine" / "evaluation" / "calibration.json").read_text())
    assert found["precision"] == 0.8
