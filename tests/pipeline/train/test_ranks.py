"""Several ranks and accumulated batches compute what one rank with the same global batch computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from mlflow import MlflowClient
from sklearn.metrics import balanced_accuracy_score, f1_score

from data.augment.augmentation import Augmentation
from data.augment.crops import EvaluationCrop
from data.loading.decoder import DecodeSettings
from data.loading.loader import Loader
from data.loading.order import EvaluationPlan
from data.shards.dataset import Dataset
from data.storage.local import LocalShards
from models.learning.averaging import AveragedWeights, Averaging
from models.learning.classifier import Classifier
from models.learning.recipe import Recipe
from models.learning.schedules import cosine
from models.separable import mobilenet
from tests.support.commands import PLAIN, TWO_RANKS, Run, Typed, journal, run_module


def assert_same_curves(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    assert len(one) == len(other) > 0
    for mine, its in zip(one, other, strict=True):
        assert mine.keys() == its.keys()
        for key, value in mine.items():
            precision = 2e-7 if key.startswith("val") else 1e-9  # evaluations are logged in float32
            assert its[key] == pytest.approx(value, rel=precision), (key, mine["step"])


def test_two_ranks_equal_one_with_twice_the_batch(run_verb: Run, train: Typed, with_digits: Path) -> None:
    tuning = ("recipe.freeze=[stem]", "recipe.head_warmup=0.1", "recipe.layer_decay=0.9")
    # More steps per point than the metrics keep unsummed.
    common = (*PLAIN, *tuning, "recipe.epochs=2", "log_every=70", "averaging=ema", "averaging.min_windows=0")
    one = train(*common, "name=one", "trainer=cpu", "data.batch_size=32", "tracking=none")
    two = run_verb("train", *common, "name=two", *TWO_RANKS, "data.batch_size=16")
    assert two.returncode == 0, two.stderr
    curves = [journal(with_digits / "runs" / name) for name in ("one", "two")]
    assert len(curves[0]) == 2 + 2  # at steps 70 and 88
    assert sum("val_ema/loss" in line for line in curves[0]) == 2
    assert_same_curves(*curves)
    for printed in (one, two.stdout):
        assert printed.count("images 359") == 2
        assert (
            "tuning      the head alone in the first 9 steps; each stage at 0.9 of the rate of the next; stem frozen\n"
            in (printed)
        )
    assert "batch       2 x 16" in two.stdout
    client = MlflowClient(f"sqlite:///{with_digits / 'mlflow.db'}")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert [point.step for point in client.get_metric_history(run.info.run_id, "receptive_field_px")] == [0]
    assert (with_digits / "runs" / "two" / "receptive_field" / "report.html").is_file()


def test_accumulated_batches_equal_one_large_batch(train: Typed, with_digits: Path) -> None:
    common = (*PLAIN, "recipe.epochs=2", "log_every=4", "tracking=none", "averaging=ema", "averaging.min_windows=0")
    train(*common, "name=large", "data.batch_size=128")
    printed = train(*common, "name=accumulated", "data.batch_size=32", "recipe.accumulate=4")
    assert "1 x 32 x 4 accumulated" in printed
    curves = [journal(with_digits / "runs" / name) for name in ("large", "accumulated")]
    assert len(curves[0]) == 6 + 2  # 11 steps an epoch, and the last of all
    assert_same_curves(*curves)


def test_torchrun_evaluates_the_weights_of_the_checkpoint(with_digits: Path, digits: Dataset) -> None:
    short = ("recipe.epochs=1", "+trainer.limit_train_batches=12", "data.batch_size=32")
    words = (
        "+model=mobilenet",
        "model.variant=mobilenet_v3_small",
        *TWO_RANKS,
        "tracking=none",
        *short,
        "name=two",
        "averaging=ema",
        "averaging.min_windows=0",
    )
    launch = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pipeline.train")
    answer = run_module(with_digits, *launch, *words, "trainer.precision=32-true")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("batch       2 x 32") == 1
    # Batch-norm statistics differ between ranks. One rank that evaluates the checkpoint gets the result of both.
    run = with_digits / "runs" / "two"
    net = mobilenet("mobilenet_v3_small", num_classes=10, image_size=16)
    module = Classifier(net, num_classes=10, recipe=recipe())
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    module.load_state_dict(saved["state_dict"])
    module.average = AveragedWeights(module.net, Averaging())
    module.average.load(saved["averages"])
    index, decode = digits.index("val"), DecodeSettings(digits.mean, digits.std)
    crop, plan = EvaluationCrop(16, crop_fraction=1.0), EvaluationPlan(len(index), 128)
    loader = Loader(index, LocalShards(digits.root), plan=plan, augment=Augmentation(crop), decode=decode)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    alone = pl.Trainer(accelerator="cpu", **quiet).validate(module, loader, verbose=False)[0]
    together = journal(run)[-1]
    assert module.evaluated_images == 359
    for key in ("val/loss", "val/top1", "val/top5", "val_ema/loss", "val_ema/top1", "val_ema/top5"):
        assert together[key] == pytest.approx(alone[key], rel=1e-5)
    with torch.inference_mode():
        answers = [(labels, module.eval()(images).argmax(1)) for images, labels, _ in loader]
    labels, predicted = (torch.cat(parts) for parts in zip(*answers, strict=True))
    assert len(labels) == 359
    assert len(predicted.unique()) > 2
    assert together["val/f1_macro"] == pytest.approx(f1_score(labels, predicted, average="macro"), rel=1e-6)
    assert together["val/balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted), rel=1e-6)


def recipe() -> Recipe:
    return Recipe(1, torch.optim.SGD, cosine)
