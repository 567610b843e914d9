"""The main job as it is typed: what it prints, what it leaves behind, and that it is the same on two ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient

from data.dataset import Dataset
from pipeline.config import check_command_line
from tests.conftest import ROOT, Run

TINY = ("recipe.epochs=2", "data.batch_size=256", "log_every=2")


@pytest.fixture
def with_digits(tmp_path: Path, digits: Dataset) -> Path:
    """The working folder of `run_verb`, with the digits packed where the config expects them."""
    shutil.copytree(digits.root, tmp_path / "datasets" / "digits")
    return tmp_path


def journal(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def kill_at(line: str, root: Path, *words: str) -> None:
    """Start a run and kill it without warning as soon as it has printed `line`."""
    command = [sys.executable, "-m", "pipeline.train", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line in printed for printed in process.stdout), "it ended before it could be killed"
        process.kill()


def only_run(root: Path) -> Path:
    (folder,) = (root / "runs").iterdir()
    return folder


def assert_printed(printed: str, folder: str, run_id: str) -> None:
    """The banner, the lines of the progress and the end are all there."""
    for wanted in (
        r"model +resnet18, 11,173,962 parameters",
        r"data +digits: train 1,438, val 359, 10 classes, 16 pixels",
        r"batch +1 x 256 on CPU",
        r"precision +(bf16-mixed|32-true), channels_last",
        rf"folder +runs/{folder}",
        rf"dashboard +http://127.0.0.1:5000/#/experiments/\d+/runs/{run_id}\?workflowType=machine_learning",
        r"step 2/10 +loss [\d.]+ +lr [\d.e-]+ +[\d,]+ images/s +data wait \d+% +memory [\d.]+ GiB +eta \d:\d\d:\d\d",
        r"epoch 2/2 .*val/top1 [\d.]+.* images 359",
        r"best val/top1 +[\d.]+ of 359 images",
        r"checkpoint +\S+best.ckpt",
        r"next +make ui",
    ):
        assert re.search(wanted, printed), wanted


def test_the_main_job_leaves_a_run_in_mlflow(run_verb: Run, with_digits: Path) -> None:
    answer = run_verb("train", "+model=resnet", *TINY)
    assert answer.returncode == 0, answer.stderr
    folder = only_run(with_digits)
    client = MlflowClient(f"sqlite:///{with_digits / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("convoy")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == folder.name
    assert run.data.metrics["params_millions"] == pytest.approx(11.173962)  # torchvision's at 10 classes, small stem
    # Parameters can be pasted back: with them as overrides the same run is meant.
    overrides = [f"{key}={value}" for key, value in run.data.params.items() if key.startswith(("recipe.", "data.b"))]
    assert len(overrides) > 8
    check_command_line("train", ["+model=resnet", *overrides])
    history = {key: client.get_metric_history(run.info.run_id, key) for key in ("train/loss", "val/top1")}
    assert [point.step for point in history["train/loss"]] == [2, 4, 6, 8, 10]
    assert [point.step for point in history["val/top1"]] == [5, 10]
    artifacts = client.list_artifacts(run.info.run_id, "config")
    assert [artifact.path for artifact in artifacts] == ["config/config.yaml"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["recipe"]["epochs"] == 2
    # The journal says the same, and the final file is there.
    assert [line["val/top1"] for line in journal(folder) if "val/top1" in line] == [
        pytest.approx(point.value) for point in history["val/top1"]
    ]
    assert json.loads((folder / "result.json").read_text())["val/top1"] == pytest.approx(
        max(point.value for point in history["val/top1"])
    )
    assert_printed(answer.stdout, folder.name, run.info.run_id)


def test_without_tracking_mlflow_is_not_imported(run_verb: Run, with_digits: Path) -> None:
    answer = run_verb("train", "+model=resnet", "tracking=none", *TINY, PYTHONPROFILEIMPORTTIME="1")
    assert answer.returncode == 0, answer.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in answer.stderr.splitlines()}
    assert "pytorch_lightning" in imported
    assert "mlflow" not in imported
    assert not (with_digits / "mlflow.db").exists()
    assert "dashboard  none" in answer.stdout
    checkpoint = torch.load(only_run(with_digits) / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["global_step"] in (5, 10)


def test_a_killed_run_goes_on_to_the_same_bits(run_verb: Run, with_digits: Path) -> None:
    words = ("+model=resnet", "tracking=none", "trainer.precision=32-true", *TINY)
    whole = run_verb("train", *words, "name=whole")
    assert whole.returncode == 0, whole.stderr
    kill_at("step 6/10", with_digits, *words, "name=cut")
    assert not (with_digits / "runs" / "cut" / "result.json").exists()
    second = run_verb("train", *words, "name=cut")
    assert "goes on from last.ckpt" in second.stdout
    ends = [journal(with_digits / "runs" / name)[-1] for name in ("whole", "cut")]
    for key in ("step", "val/loss", "val/top1"):
        assert ends[0][key] == ends[1][key]
    whole_weights, cut_weights = (
        torch.load(with_digits / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "cut")
    )
    assert len(whole_weights) > 100
    assert all(torch.equal(tensor, cut_weights[key]) for key, tensor in whole_weights.items())


def test_two_ranks_train_and_evaluate_as_one_with_twice_the_batch(run_verb: Run, with_digits: Path) -> None:
    # In float64: what a sum in another order changes stays far below what a wrong batch would.
    common = (
        "+model=resnet", "model._target_=tests.networks.plain", "trust=true", "trainer.precision=64-true",
        "recipe.epochs=4", "log_every=70", "recipe.clip_norm=1.0",
    )  # fmt: skip
    one = run_verb("train", *common, "name=one", "trainer=cpu", "data.batch_size=64", "tracking=none")
    assert one.returncode == 0, one.stderr
    devices = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    two = run_verb("train", *common, "name=two", *devices, "data.batch_size=32")
    assert two.returncode == 0, two.stderr
    curves = [journal(with_digits / "runs" / name) for name in ("one", "two")]
    assert len(curves[0]) == len(curves[1]) == 1 + 4  # more steps a point than are kept unsummed
    for alone, together in zip(*curves, strict=True):
        assert alone["step"] == together["step"]
        for key in ("train/loss", "train/top1", "train/lr", "val/loss", "val/top1", "val/top5"):
            if key in alone:
                assert together[key] == pytest.approx(alone[key], rel=1e-9), (key, alone["step"])
    for answer in (one, two):
        assert answer.stdout.count("images 359") == 4
    assert "batch      2 x 32" in two.stdout
    client = MlflowClient(f"sqlite:///{with_digits / 'mlflow.db'}")
    assert len(client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+model.num_classes=4"], "model.num_classes=4, but labels of digits go to 9"),
        (["data.batch_size=5000"], "1438 training images are fewer than a global batch of 5000"),
        (["model.variant=resnet19"], "model.variant=resnet19 is not one of resnet18"),
        (["+trainer.acelerator=cpu"], "unexpected keyword argument 'acelerator'"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(
    run_verb: Run, with_digits: Path, words: list[str], message: str
) -> None:
    answer = run_verb("train", "+model=resnet", *words)
    assert answer.returncode == 1
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not (with_digits / "runs").exists(), "a mistake leaves no run behind"
