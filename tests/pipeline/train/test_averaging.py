"""Averaged weights in a training: in its checkpoints, its journal, its choice, and left out where it is short."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from data.augment.augmentation import Augmentation
from data.loading.decoder import DecodeSettings
from data.loading.loader import Loader
from data.loading.order import EvaluationPlan
from data.shards.dataset import Dataset
from data.storage.local import LocalShards
from pipeline.runs.restore import RestoredRun
from tests.support.commands import Typed, journal

# A network with batch norm and dropout; both trainings take the same six steps.
WORDS = (
    "+model=mobilenet", "model.variant=mobilenet_v3_small", "data.batch_size=32", "trainer.precision=32-true",
    "recipe.epochs=2", "+trainer.limit_train_batches=3", "tracking=none", "averaging=ema", "averaging.min_windows=0",
)  # fmt: skip


def loss_of(run: RestoredRun, digits: Dataset) -> float:
    """The mean loss of the network that a run's weights are for every other command."""
    index, decode = digits.index("val"), DecodeSettings(digits.mean, digits.std)
    plan = EvaluationPlan(len(index), 128)
    crop, (net, _) = run.build_evaluation_crop(), run.load_network()
    loader = Loader(index, LocalShards(digits.root), plan=plan, augment=Augmentation(crop), decode=decode)
    with torch.inference_mode():
        losses = [functional.cross_entropy(net.eval()(one.images), one.labels, reduction="none") for one in loader]
    return float(torch.cat(losses).mean())


def test_the_chosen_weights_are_those_of_the_checkpoint_for_every_reader(
    train: Typed, with_digits: Path, digits: Dataset
) -> None:
    raw = train(*WORDS, "name=raw", "choose_by=loss")
    averaged = train(*WORDS, "name=averaged", "choose_by=val_ema/loss")
    assert "averaging   weights of about the last 3 steps at the end; choose_by=val_ema/loss keeps them in best" in raw
    assert "averaging   weights of about the last 3 steps at the end\n" in averaged
    assert "the best checkpoint has the lowest val_ema/loss\n" in averaged
    runs = with_digits / "runs"
    assert journal(runs / "raw") == journal(runs / "averaged")
    files = [torch.load(runs / name / "checkpoints" / "best.ckpt", weights_only=True) for name in ("raw", "averaged")]
    assert files[0].keys() ^ files[1].keys() == {"averages", "state_dict_ema"}
    for name, key, file in (("raw", "val/loss", files[0]), ("averaged", "val_ema/loss", files[1])):
        result = RestoredRun(runs / name).run.result()
        line = next(line for line in journal(runs / name) if line["step"] == file["global_step"] and key in line)
        assert (result["chosen_by"], result[key]) == (key, line[key])
        assert result[key] == min(line[key] for line in journal(runs / name) if key in line)
        assert result[key.replace("loss", "top1")] == line[key.replace("loss", "top1")]
        assert loss_of(RestoredRun(runs / name), digits) == pytest.approx(line[key], rel=1e-5)
        assert line["val/loss"] != line["val_ema/loss"]


def test_a_short_training_is_not_averaged(train: Typed, with_digits: Path) -> None:
    words = ("+model=lenet", "recipe.epochs=2", "data.batch_size=64", "tracking=none", "averaging=ema", "name=short")
    printed = train(*words, "choose_by=val_ema/top1", "stop_early=2")
    off = "averaging   off: 44 steps are fewer than 10 windows of 12 steps; val/top1 chooses instead of val_ema/top1\n"
    assert off in printed
    assert "the best checkpoint has the highest val/top1\n" in printed
    assert "stop early  after 2 evaluations in a row without an improvement of val/top1\n" in printed
    run = RestoredRun(with_digits / "runs" / "short").run
    assert run.result()["chosen_by"] == "val/top1"
    assert run.result()["val/top1"] == max(line.get("val/top1", 0) for line in journal(run.folder))
    assert not any("val_ema/top1" in line for line in journal(run.folder))
    assert "averages" not in torch.load(run.checkpoints.path / "last.ckpt", weights_only=True)
