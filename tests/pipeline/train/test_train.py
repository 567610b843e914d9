"""The main job as it is typed: what it prints and leaves behind, and how mistakes are answered."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from hydra.errors import HydraException
from rich.console import Console

from data.loading.order import TrainingPlan
from data.shards.dataset import Dataset
from models.learning.classifier import Classifier
from models.learning.schedules import cosine
from pipeline.cli.check import check_command_line
from pipeline.runs.restore import RestoredRun
from pipeline.train import fit
from pipeline.train.__main__ import VERB
from tests.support.commands import PLAIN, TINY, TWO_RANKS, FinishedRun, Run, Typed, journal
from tests.support.shards import make_samples, write_tar


def only_run(root: Path) -> Path:
    (folder,) = (root / "runs").iterdir()
    return folder


def test_the_main_job_prints_header_progress_and_result(main_job: FinishedRun) -> None:
    _, run = main_job.in_mlflow()
    page = rf"http://127.0.0.1:5000/#/experiments/\d+/runs/{run.info.run_id}\?workflowType=machine_learning"
    for line in (
        r"model +resnet18, 11,173,962 parameters",
        r"data +digits: train 1,438, val 359, 10 classes, 16 pixels",
        r"evaluation +359 images of split val",
        r"batch +1 x 64 on CPU",
        r"precision +(bf16-mixed|32-true), channels_last",
        r"steps +10 in 2 epochs; each epoch drops 1,118 images, different ones each time",
        rf"folder +runs/{main_job.folder.name}",
        rf"dashboard +{page}",
        r"step 2/10 +loss [\d.]+ +lr [\d.e-]+ +[\d,]+ images/s +data wait \d+% +memory [\d.]+ GiB +eta \d:\d\d:\d\d",
        r"epoch 2/2 .*val/top1 [\d.]+.* images 359",
        r"best val/top1 +[\d.]+ on 359 images of split val",
        r"checkpoint +runs/\S+/checkpoints/best.ckpt",
        r"dashboard +make ui",
        rf"next +python -m pipeline.evaluate run=runs/{main_job.folder.name}",
    ):
        assert re.search(line, main_job.printed), line


def test_the_main_job_is_a_run_in_mlflow(main_job: FinishedRun) -> None:
    client, run = main_job.in_mlflow()
    assert run.info.status == "FINISHED"
    assert run.info.run_name == main_job.folder.name
    assert run.data.metrics["params_millions"] == pytest.approx(11.173962)  # torchvision's at 10 classes, small stem
    history = {key: client.get_metric_history(run.info.run_id, key) for key in ("train/loss", "val/top1")}
    assert [point.step for point in history["train/loss"]] == [2, 4, 6, 8, 10]
    assert [point.step for point in history["val/top1"]] == [5, 10]
    artifacts = client.list_artifacts(run.info.run_id, "config")
    assert [artifact.path for artifact in artifacts] == ["config/config.yaml"]
    assert [line["val/top1"] for line in journal(main_job.folder) if "val/top1" in line] == [
        pytest.approx(point.value) for point in history["val/top1"]
    ]
    best = max(point.value for point in history["val/top1"])
    assert json.loads((main_job.folder / "result.json").read_text())["val/top1"] == pytest.approx(best)


def test_logged_parameters_are_valid_overrides(main_job: FinishedRun) -> None:
    _, run = main_job.in_mlflow()
    overrides = [f"{key}={value}" for key, value in run.data.params.items() if key.startswith(("recipe.", "data.b"))]
    assert len(overrides) > 8
    check_command_line(VERB, ["+model=resnet", *overrides])


def test_a_point_has_the_learning_rate_of_its_step(main_job: FinishedRun) -> None:
    # Of 10 steps, the warm-up takes one; points count steps from 1. 0.256 is for 256 images a step.
    assert [line["train/lr"] for line in journal(main_job.folder) if "train/lr" in line] == pytest.approx(
        [0.256 * 64 / 256 * cosine((step - 2) / 9) for step in (2, 4, 6, 8, 10)]
    )


def test_a_run_is_restored_from_its_folder(main_job: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(main_job.root)
    run = RestoredRun(main_job.folder)
    checkpoint = torch.load(run.weights_file, weights_only=True)
    net, sha256 = run.load_network()
    assert sha256 == hashlib.sha256(run.weights_file.read_bytes()).hexdigest()
    weights = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    assert weights.keys() == checkpoint["state_dict"].keys()
    assert all(torch.equal(tensor, checkpoint["state_dict"][name]) for name, tensor in weights.items())
    assert len(run.open_dataset().classes) == 10
    assert (run.network, run.image_size, run.batch_size) == ("resnet18", 16, 64)
    assert run.build_recipe().epochs == 2


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+model.num_classes=0"], "model.num_classes=0, but digits has labels up to 9"),
        (["+model.num_classes=4"], "model.num_classes=4, but digits has labels up to 9"),
        (["model.in_channels=1"], "model.in_channels=1, but all images are decoded to 3 channels"),
        (["data.batch_size=5000"], "1438 training images are fewer than a global batch of 5000"),
        (["recipe.accumulate=0"], "recipe.accumulate=0 must be an integer of at least 1"),
        (["data.threads=many"], "data.threads=many must be an integer"),
        (["recipe.clip_norm=much"], "recipe.clip_norm=much must be a number above 0, or null"),
        (["model.variant=resnet19"], "model.variant=resnet19 is not one of resnet18"),
        (["+trainer.acelerator=cpu"], "there is no trainer.acelerator: did you mean trainer.accelerator?"),
        (["+trainer.max_epochs=3"], "trainer.max_epochs is set by recipe.epochs"),
        (["data.root=nowhere"], "data.root=nowhere is not a folder"),
        (["data.root=2024", "data=shards"], "data.root=2024 is not a folder"),
        (["+model.num_classes=ten"], "model.num_classes=ten must be an integer"),
        (["+recipe.optimizer.rate=1"], "recipe.optimizer=SGD: SGD.__init__() got an unexpected keyword argument"),
        (["recipe.optimizer._target_=torch.optim.AdamW"], "unexpected keyword argument 'momentum'"),
        (["trainer=gpu"], "trainer.accelerator=gpu: there is no GPU ("),
        (["+trainer.limit_train_batches=3", "recipe.accumulate=2"], "leaves 3 of 22 batches an epoch"),
        (["name=../elsewhere"], "name=../elsewhere is a path"),
        (["name=.."], "name=.. is a path"),
        (["seed=-1"], "seed=-1 must be at least 0 and less than 2^32"),
        (["+optimizer=adamw"], "+optimizer=adamw needs no plus: optimizer=adamw"),
        (["data=shards", "data.root=fotos ä=1"], "data.root=fotos ä=1 is not a folder"),
        (["data.image_size=0"], "data.image_size=0 must be an integer of at least 1"),
        (["recipe.loss.label_smoothing=2.0"], "recipe.loss.label_smoothing=2.0 must be at least 0"),
        (
            ["choose_by=f2"],
            "choose_by=f2 is not one of top1, top5, loss, f1_macro, balanced_accuracy: did you mean f1?",
        ),
        (["choose_by=val/los"], "balanced_accuracy: did you mean val/loss?"),
        (["choose_by=banana"], "choose_by=banana is not one of top1, top5, loss, f1_macro, balanced_accuracy"),
        (
            ["choose_by=val_ema/f1"],
            "choose_by=val_ema/f1 needs averaged weights: add averaging=ema, or take choose_by=f1",
        ),
        (
            ["averaging=ema", "averaging.decay=1"],
            "averaging.decay=1 must be at least 0 and less than 1, such as 0.9998",
        ),
        (
            ["averaging=ema", "trainer.precision=bf16-true"],
            "trainer.precision=bf16-true has weights that are too coarse",
        ),
        (["checkpoint.keep=1"], "checkpoint.keep=1 must be an integer of at least 2"),
        (["stop_early=0"], "stop_early=0 must be a number of evaluations of at least 1, as in stop_early=5, or null"),
        (["stop_early=-1"], "stop_early=-1 must be a number of evaluations of at least 1"),
        (["stop_early=soon"], "stop_early=soon must be a number of evaluations of at least 1"),
        (["stop_early=true"], "stop_early=True must be a number of evaluations of at least 1"),
        (["stop_early=2.5"], "stop_early=2.5 must be a number of evaluations of at least 1"),
        (["stop_early=2", "min_improvement=-1"], "min_improvement=-1 must be a number of at least 0"),
        (["stop_early=2", "min_improvement=nan"], "min_improvement=nan must be a number of at least 0"),
        (["min_improvement=0.01"], "min_improvement=0.01 needs early stopping: add stop_early=5"),
        (["stop_early=2", "+trainer.limit_val_batches=0"], "stop_early=2 needs an evaluation: leave stop_early or"),
        (["checkpoint.every_steps=0.5"], "checkpoint.every_steps=0.5 must be an integer of at least 1, or null"),
        (["checkpoint.every_minutes=0"], "checkpoint.every_minutes=0 must be a number above 0, or null"),
        (["on_nonfinite=ignore"], "on_nonfinite=ignore is not one of stop, skip"),
        (["hang_seconds=0"], "hang_seconds=0 must be a number above 0"),
        (["mix=mixup", "recipe.mix.mixup_alpha=-1"], "recipe.mix.mixup_alpha=-1 must be a number of at least 0"),
        (["mix=mixup", "recipe.mix.mixup_alpha=0"], "recipe.mix.cutmix_alpha=0.0 is off, and so is mixup_alpha"),
        (["mix=cutmix", "recipe.mix.probability=2"], "recipe.mix.probability=2 must be a number from 0 to 1"),
        (["mix=cutmix", "data.batch_size=1"], "data.batch_size=1 leaves an image no other to be mixed with"),
        (["loss=binary_cross_entropy", "recipe.loss.target_threshold=1"], "recipe.loss.target_threshold=1 must be at"),
        (["augment.training.scale=[0.5]"], "augment.training.scale=[0.5] must be a range of two numbers"),
        (["augment.training.scale=[a,b]"], "augment.training.scale=['a', 'b'] must be a range of two numbers"),
        (["trainer.precision=16-mixed"], "trainer.precision=16-mixed needs a GPU: use auto, bf16-mixed or 32-true"),
        (["optimizer=schedule_free", "on_nonfinite=skip"], "on_nonfinite=skip does not go with an optimizer that"),
        (["schedule=cosine", "recipe.schedule.final_fraction=-1"], "recipe.schedule.final_fraction=-1 must be the la"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(
    train: Typed, with_digits: Path, words: list[str], message: str
) -> None:
    with pytest.raises((ValueError, OSError, HydraException)) as error:
        train("+model=resnet", *words)
    assert message in str(error.value)
    assert not (with_digits / "runs").exists(), "a mistake must leave no run"


def test_a_folder_without_tars_is_answered_with_the_command_that_packs_it(train: Typed, with_digits: Path) -> None:
    (with_digits / "photos").mkdir()
    with pytest.raises(
        ValueError, match=r"data.root=photos is not a data set: .*pipeline.pack source=folder source.root=photos"
    ):
        train("+model=resnet", "data=shards", "data.root=photos")
    (with_digits / "photos" / "train.tar.gz").touch()
    with pytest.raises(ValueError, match=r"train.tar.gz is compressed, so it cannot be read by position: unpack it"):
        train("+model=resnet", "data=shards", "data.root=photos")


@pytest.mark.parametrize("limit", [3, 0.05])  # of 71 batches
def test_a_shortened_epoch_ends_with_an_evaluation(
    train: Typed, with_digits: Path, digits: Dataset, limit: float
) -> None:
    samples: list[tuple[int, ...]] = []
    step = Classifier.training_step

    def remember(module: Classifier, batch: tuple[torch.Tensor, ...], batch_index: int) -> torch.Tensor:
        samples.append(tuple(batch[2].tolist()))
        return step(module, batch, batch_index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "training_step", remember)
        train(*PLAIN, f"+trainer.limit_train_batches={limit}", "recipe.epochs=3", "data.batch_size=20", "tracking=none")
    lines = journal(only_run(with_digits))
    assert [line["step"] for line in lines if "val/top1" in line] == [3, 6, 9]
    split = digits.index("train").shard_samples
    plan = TrainingPlan(split, seed=0, shuffle_window=4_000_000, batch_size=20)
    expected = [tuple(plan.samples(epoch, step).tolist()) for epoch in range(3) for step in range(3)]
    assert samples == expected


def test_mixing_is_announced(train: Typed, with_digits: Path) -> None:
    short = ("recipe.epochs=1", "+trainer.limit_train_batches=1", "+trainer.limit_val_batches=1", "tracking=none")
    assert not re.search("^mixing ", train("+model=lenet", *short), re.MULTILINE)
    printed = train("+model=lenet", *short, "mix=mixup", "loss=binary_cross_entropy")
    assert re.search(r"^mixing +mixup \(alpha 0.2\); train/top1 weighs the two labels", printed, re.MULTILINE)


def test_a_refusal_is_one_sentence(run_verb: Run, with_digits: Path) -> None:
    answer = run_verb("train", "+model=resnet", "model.variant=resnet19")
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: model.variant=resnet19 is not one of resnet18")
    assert answer.stderr.count("\n") == 1


def test_foreign_tars_are_trained_on_with_their_index_elsewhere(train: Typed, tmp_path: Path) -> None:
    write_tar(tmp_path / "tars" / "train-0.tar", make_samples(12))
    write_tar(tmp_path / "tars" / "val-0.tar", make_samples(1))
    words = ("+model=resnet", "data.root=tars", "data.index=index", "data.image_size=16", "tracking=none")
    printed = train(*words, "data.batch_size=4", "recipe.epochs=1")
    assert "tars: train 12, val 1, 3 classes" in printed
    assert sorted(path.name for path in (tmp_path / "tars").iterdir()) == ["train-0.tar", "val-0.tar"]
    with pytest.raises(ValueError, match="2 ranks are more than the 1 images to evaluate"):
        train(*words, "data.batch_size=4", *TWO_RANKS)


def test_a_terminal_gets_a_bar(train: Typed, with_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (with_digits / "terminal").open("w") as terminal:
        console = Console(file=terminal, force_terminal=True, width=120)
        monkeypatch.setattr(fit, "main_console", lambda: console)
        train("+model=lenet", "tracking=none", *TINY)
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", (with_digits / "terminal").read_text())
    assert re.search(r"epoch 2/2 +loss [\d.]+ .*━ 10/10 .* images/s 0:00:00", shown)
    assert "step 2/10" not in shown  # lines are for logs
    assert "epoch 2/2  val/loss" in shown
