"""The main job as it is typed: what it prints, what it leaves behind, and that it is the same on two ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from hydra.errors import HydraException
from mlflow import MlflowClient
from rich.console import Console

from data.loading.crops import EvaluationView
from data.loading.graph import Decode
from data.loading.loader import Loader, LocalShards
from data.loading.order import EvaluationPlan, TrainingPlan
from data.shards.dataset import Dataset
from models.learning.classifier import Classifier
from models.learning.recipe import Recipe, warmup_cosine
from models.residual import resnet
from pipeline.cli.config import check_command_line
from pipeline.train import fit as training
from tests.conftest import ROOT, Run
from tests.data.shards.test_indexing import make_samples, write_tar
from tests.pipeline.conftest import Report, Train, journal
from tests.pipeline.train.test_train_report import assert_reported, assert_reports_agree

TINY = ("recipe.epochs=2", "data.batch_size=256", "log_every=2")
# A network without batch norm in float64: what a sum in another order changes stays far below what a wrong batch would.
PLAIN = (
    "+model=resnet", "model._target_=tests.support.networks.plain", "trust=true", "trainer.precision=64-true",
    "recipe.clip_norm=1.0",
)  # fmt: skip
TWO_RANKS = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")


def stop_at(line: str, root: Path, words: tuple[str, ...], *, by: signal.Signals) -> tuple[int, str]:
    """Start a run and send it a signal as soon as it has printed `line`; returns exit code and last words."""
    command = [sys.executable, "-m", "pipeline.train", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # A shell's background jobs ignore SIGINT, and so would what they start; a handler of ours is not inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line in printed for printed in process.stdout), "it ended before it could be stopped"
        process.send_signal(by)
        rest = process.stdout.read()
        return process.wait(), rest


def only_run(root: Path) -> Path:
    (folder,) = (root / "runs").iterdir()
    return folder


def assert_printed(printed: str, folder: str, run_id: str) -> None:
    """The banner, the lines of the progress and the end are all there."""
    for wanted in (
        r"model +resnet18, 11,173,962 parameters",
        r"data +digits: train 1,438, val 359, 10 classes, 16 pixels",
        r"batch +1 x 64 on CPU",
        r"precision +(bf16-mixed|32-true), channels_last",
        rf"folder +runs/{folder}",
        rf"dashboard +http://127.0.0.1:5000/#/experiments/\d+/runs/{run_id}\?workflowType=machine_learning",
        r"step 2/10 +loss [\d.]+ +lr [\d.e-]+ +[\d,]+ images/s +data wait \d+% +memory [\d.]+ GiB +eta \d:\d\d:\d\d",
        r"epoch 2/2 .*val/top1 [\d.]+.* images 359",
        r"evaluation +359 images of split val",
        r"best val/top1 +[\d.]+ of 359 images of split val",
        r"checkpoint +runs/\S+/checkpoints/best.ckpt",
        r"next +make ui",
    ):
        assert re.search(wanted, printed), wanted


def test_the_main_job_leaves_a_run_in_mlflow(run_verb: Run, report: Report, with_digits: Path) -> None:
    short = ("recipe.epochs=2", "+trainer.limit_train_batches=5", "log_every=2")
    answer = run_verb("train", "+model=resnet", *short)
    assert answer.returncode == 0, answer.stderr
    folder = only_run(with_digits)
    client = MlflowClient(f"sqlite:///{with_digits / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("convoy")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == folder.name
    assert run.data.metrics["params_millions"] == pytest.approx(11.173962)  # torchvision's at 10 classes, small stem
    assert_reported(client, run)
    assert_reports_agree(report, folder)
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
    # The learning rate of a point is that of its step: 5 steps an epoch, one epoch of warm-up, steps counted from 1.
    assert [line["train/lr"] for line in journal(folder) if "train/lr" in line] == pytest.approx(
        [0.1 * warmup_cosine(s - 1, steps_per_epoch=5, num_steps=10, warmup_epochs=1) for s in (2, 4, 6, 8, 10)]
    )
    # The journal says the same, and the final file is there.
    assert [line["val/top1"] for line in journal(folder) if "val/top1" in line] == [
        pytest.approx(point.value) for point in history["val/top1"]
    ]
    assert json.loads((folder / "result.json").read_text())["val/top1"] == pytest.approx(
        max(point.value for point in history["val/top1"])
    )
    assert_printed(answer.stdout, folder.name, run.info.run_id)


def test_without_tracking_mlflow_is_not_imported(run_verb: Run, with_digits: Path) -> None:
    answer = run_verb("train", "+model=lenet", "tracking=none", *TINY, PYTHONPROFILEIMPORTTIME="1")
    assert answer.returncode == 0, answer.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in answer.stderr.splitlines()}
    assert "pytorch_lightning" in imported
    assert "mlflow" not in imported
    assert not (with_digits / "mlflow.db").exists()
    assert re.search("dashboard +none", answer.stdout)
    checkpoint = torch.load(only_run(with_digits) / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["global_step"] in (5, 10)


def test_a_run_stopped_again_and_again_goes_on_to_the_same_bits(train: Train, with_digits: Path) -> None:
    # A network with batch norm, dropout and stochastic depth: averages and random numbers have to go on too.
    net = ("+model=mobilenet", "model.variant=mobilenet_v3_small", "model.stochastic_depth=0.2")
    common = (*net, "recipe.optimizer.lr=0.001", "trainer.precision=32-true", "data.batch_size=32", "tracking=none")
    # Five steps an epoch; points that reach over the ends of epochs, where checkpoints are.
    words = (*common, "recipe.epochs=3", "+trainer.limit_train_batches=5", "log_every=3")
    train(*words, "name=whole")
    runs, cut = with_digits / "runs", (*words, "name=cut")
    code, said = stop_at("step 3/15", with_digits, cut, by=signal.SIGINT)
    assert (code, "stopped: the same command goes on at its beginning" in said) == (130, True)
    code, said = stop_at("step 6/15", with_digits, cut, by=signal.SIGTERM)
    assert (code, "stopped: the same command goes on after step 5" in said) == (143, True)
    assert stop_at("step 12/15", with_digits, cut, by=signal.SIGKILL)[0] == -signal.SIGKILL
    assert not (runs / "cut" / "result.json").exists()
    assert "goes on from last.ckpt" in train(*cut)
    whole, resumed = journal(runs / "whole"), journal(runs / "cut")
    assert len(whole) == 5 + 3
    assert resumed == whole
    weights = [
        torch.load(runs / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "cut")
    ]
    assert len(weights[0]) > 100
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())


def assert_same_curves(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    assert len(one) == len(other) > 0
    for mine, its in zip(one, other, strict=True):
        assert mine.keys() == its.keys()
        for key, value in mine.items():
            precision = 2e-7 if key.startswith("val/") else 1e-9  # evaluations are reported in float32
            assert its[key] == pytest.approx(value, rel=precision), (key, mine["step"])


def test_two_ranks_train_and_evaluate_as_one_with_twice_the_batch(
    run_verb: Run, train: Train, with_digits: Path
) -> None:
    common = (*PLAIN, "recipe.epochs=2", "log_every=70")  # more steps a point than are kept unsummed
    one = train(*common, "name=one", "trainer=cpu", "data.batch_size=32", "tracking=none")
    two = run_verb("train", *common, "name=two", *TWO_RANKS, "data.batch_size=16")
    assert two.returncode == 0, two.stderr
    curves = [journal(with_digits / "runs" / name) for name in ("one", "two")]
    assert len(curves[0]) == 2 + 2  # at steps 70 and 88
    assert_same_curves(*curves)
    for printed in (one, two.stdout):
        assert printed.count("images 359") == 2
    assert "batch       2 x 16" in two.stdout
    client = MlflowClient(f"sqlite:///{with_digits / 'mlflow.db'}")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert [point.step for point in client.get_metric_history(run.info.run_id, "receptive_field_px")] == [0]
    assert (with_digits / "runs" / "two" / "receptive_field" / "report.html").is_file()


def test_accumulated_batches_train_as_one_large_batch(train: Train, with_digits: Path) -> None:
    common = (*PLAIN, "recipe.epochs=2", "log_every=4", "tracking=none")
    train(*common, "name=large", "data.batch_size=128")
    printed = train(*common, "name=accumulated", "data.batch_size=32", "recipe.accumulate=4")
    assert "1 x 32 x 4 accumulated" in printed
    curves = [journal(with_digits / "runs" / name) for name in ("large", "accumulated")]
    assert len(curves[0]) == 6 + 2  # 11 steps an epoch, and the last of all
    assert_same_curves(*curves)


def test_under_torchrun_all_ranks_evaluate_what_the_checkpoint_holds(with_digits: Path, digits: Dataset) -> None:
    short = ("recipe.epochs=1", "+trainer.limit_train_batches=3", "data.batch_size=32")
    words = ("+model=resnet", *TWO_RANKS, "tracking=none", *short, "name=two")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    answer = subprocess.run(
        [sys.executable, *launch, "-m", "pipeline.train", *words, "trainer.precision=32-true"],
        cwd=with_digits, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("batch       2 x 32") == 1
    # Batch norm has seen other images on each rank. Evaluated alone, the checkpoint gives what both gave together.
    run = with_digits / "runs" / "two"
    module = Classifier(resnet("resnet18", num_classes=10, image_size=16), num_classes=10, recipe=recipe())
    module.load_state_dict(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    index, decode = digits.index("val"), Decode(digits.mean, digits.std)
    view, plan = EvaluationView(16, crop_fraction=1.0), EvaluationPlan(len(index), 128)
    loader = Loader(index, LocalShards(digits.root), plan=plan, view=view, decode=decode)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    alone = pl.Trainer(accelerator="cpu", **quiet).validate(module, loader, verbose=False)[0]
    together = journal(run)[-1]
    assert module.evaluated_images == 359
    for key in ("val/loss", "val/top1", "val/top5"):
        assert together[key] == pytest.approx(alone[key], rel=1e-5)


def recipe() -> Recipe:
    return Recipe(1, torch.optim.SGD, warmup_cosine)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+model.num_classes=0"], "model.num_classes=0, but labels of digits go to 9"),
        (["+model.num_classes=4"], "model.num_classes=4, but labels of digits go to 9"),
        (["model.in_channels=1"], "model.in_channels=1, but every image is shown with 3 channels"),
        (["data.batch_size=5000"], "1438 training images are fewer than a global batch of 5000"),
        (["data.threads=many"], "data.threads=many must be a whole number"),
        (["recipe.clip_norm=much"], "recipe.clip_norm=much must be a number above 0, or null"),
        (["model.variant=resnet19"], "model.variant=resnet19 is not one of resnet18"),
        (["+trainer.acelerator=cpu"], "there is no trainer.acelerator: did you mean trainer.accelerator?"),
        (["+trainer.max_epochs=3"], "trainer.max_epochs is decided by recipe.epochs"),
        (["data.root=nowhere"], "data.root=nowhere is no folder"),
        (["data.root=2024", "data=shards"], "data.root=2024 is no folder"),
        (["+model.num_classes=ten"], "model.num_classes=ten must be a whole number"),
        (["+recipe.optimizer.rate=1"], "recipe.optimizer or recipe.schedule: "),
        (["recipe.optimizer._target_=torch.optim.AdamW"], "unexpected keyword argument 'momentum'"),
        (["trainer=gpu"], "trainer: No supported gpu backend found"),
        (["+trainer.limit_train_batches=3", "recipe.accumulate=2"], "leaves 3 of 22 batches an epoch"),
        (["name=../elsewhere"], "name=../elsewhere is a path"),
        (["augment.training.scale=[0.5]"], "augment.training.scale=[0.5] must be a range of two numbers"),
    ],
)
def test_what_cannot_be_trained_is_refused(train: Train, with_digits: Path, words: list[str], message: str) -> None:
    with pytest.raises((ValueError, OSError, HydraException)) as error:
        train("+model=resnet", *words)
    assert message in str(error.value)
    assert not (with_digits / "runs").exists(), "a mistake leaves no run behind"


@pytest.mark.parametrize("limit", [3, 0.05])  # of 71 batches
def test_a_shortened_epoch_ends_with_an_evaluation(
    train: Train, with_digits: Path, digits: Dataset, limit: float
) -> None:
    seen: list[tuple[int, ...]] = []
    step = Classifier.training_step

    def remember(module: Classifier, batch: tuple[torch.Tensor, ...], batch_index: int) -> torch.Tensor:
        seen.append(tuple(batch[2].tolist()))
        return step(module, batch, batch_index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "training_step", remember)
        train(*PLAIN, f"+trainer.limit_train_batches={limit}", "recipe.epochs=3", "data.batch_size=20", "tracking=none")
    lines = journal(only_run(with_digits))
    assert [line["step"] for line in lines if "val/top1" in line] == [3, 6, 9]
    split = digits.index("train").shard_samples
    plan = TrainingPlan(split, seed=0, window=4_000_000, batch_size=20)
    expected = [tuple(plan.samples(epoch, step).tolist()) for epoch in range(3) for step in range(3)]
    assert seen == expected


def test_what_cannot_be_trained_is_one_sentence(run_verb: Run, with_digits: Path) -> None:
    answer = run_verb("train", "+model=resnet", "model.variant=resnet19")
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: model.variant=resnet19 is not one of resnet18")
    assert answer.stderr.count("\n") == 1


def test_tars_of_others_are_trained_on_with_their_index_elsewhere(train: Train, tmp_path: Path) -> None:
    write_tar(tmp_path / "tars" / "train-0.tar", make_samples(12))
    write_tar(tmp_path / "tars" / "val-0.tar", make_samples(1))
    words = ("+model=resnet", "data.root=tars", "data.index=index", "data.image_size=16", "tracking=none")
    printed = train(*words, "data.batch_size=4", "recipe.epochs=1")
    assert "tars: train 12, val 1, 3 classes" in printed
    assert sorted(path.name for path in (tmp_path / "tars").iterdir()) == ["train-0.tar", "val-0.tar"]
    with pytest.raises(ValueError, match="2 ranks are more than the 1 images to evaluate"):
        train(*words, "data.batch_size=4", *TWO_RANKS)


def test_a_run_is_not_continued_with_other_values(train: Train, with_digits: Path) -> None:
    words = ("+model=lenet", "tracking=none", *TINY, "name=mine")
    train(*words)
    (with_digits / "runs" / "mine" / "result.json").unlink()  # as if it had been killed at its last step
    for change in ("recipe.optimizer.lr=0.2", "seed=1", "augment.training.flip=0.5"):
        with pytest.raises(ValueError, match=f"runs/mine was begun with {change.partition('=')[0]}="):
            train(*words, change)
    with pytest.raises(ValueError, match="begun with global_batch_size=256, not 128"):
        train(*words, "data.batch_size=128")
    assert "goes on from last.ckpt" in train(*words, "data.batch_size=128", "recipe.accumulate=2")


def test_a_moved_run_remembers_its_best_and_its_page(train: Train, with_digits: Path) -> None:
    words = ("+model=lenet", *TINY, "name=mine", "+trainer.limit_val_batches=1")
    train(*words)
    folder = with_digits / "runs" / "mine"
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").unlink()
    (with_digits / "runs").rename(with_digits / "elsewhere")
    train(*words, "runs=elsewhere")
    assert json.loads((with_digits / "elsewhere" / "mine" / "result.json").read_text()) == {
        "val/top1": result["val/top1"], "checkpoint": "elsewhere/mine/checkpoints/best.ckpt",
    }  # fmt: skip
    client = MlflowClient(f"sqlite:///{with_digits / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("convoy")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    points = {key: client.get_metric_history(run.info.run_id, key) for key in ("train/loss", "params_millions")}
    assert [point.step for point in points["train/loss"]] == [2, 4, 6, 8, 10]
    assert [point.step for point in points["params_millions"]] == [0]


def test_a_run_is_trained_by_one_process(train: Train, with_digits: Path) -> None:
    with (
        training.Run("mine", with_digits / "runs" / "mine").held(),
        pytest.raises(ValueError, match="runs/mine is held by a running process: add name=NAME"),
    ):
        train("+model=lenet", "tracking=none", *TINY, "name=mine")


def test_a_damaged_checkpoint_is_named(train: Train, with_digits: Path) -> None:
    words = ("+model=lenet", "tracking=none", *TINY, "name=mine")
    train(*words)
    (with_digits / "runs" / "mine" / "result.json").unlink()
    (with_digits / "runs" / "mine" / "checkpoints" / "last.ckpt").write_bytes(b"PK no more")
    with pytest.raises(ValueError, match=r"last.ckpt cannot be read .* remove it to begin the run anew"):
        train(*words)


def test_precision_is_what_the_device_is_fast_at(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, expected in (
        ({}, "32-true"),
        ({"avx512_bf16": True}, "bf16-mixed"),
        ({"amx_bf16": 1}, "bf16-mixed"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert training.choose_precision("auto", "cpu") == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in (((7, 5), "16-mixed"), ((8, 0), "bf16-mixed"), ((9, 0), "bf16-mixed")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        assert training.choose_precision("auto", "auto") == expected
    assert training.choose_precision("16-mixed", "auto") == "16-mixed"


def test_a_terminal_gets_a_bar(train: Train, with_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (with_digits / "terminal").open("w") as terminal:
        console = Console(file=terminal, force_terminal=True, width=120)
        monkeypatch.setattr(training, "main_console", lambda: console)
        train("+model=lenet", "tracking=none", *TINY)
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", (with_digits / "terminal").read_text())
    assert re.search(r"epoch 2/2 +loss [\d.]+ .*━ 10/10 .* images/s 0:00:00", shown)
    assert "step 2/10" not in shown  # the lines are for logs
    assert "epoch 2/2  val/loss" in shown
