"""The metric that chooses the best checkpoint, and the split on which it does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.runs.restore import RestoredRun
from tests.support.commands import Typed, journal
from tests.support.scored import SCORES
from tests.support.shards import make_samples, write_tar

SCRIPTED = ("+model=lenet", "classifier._target_=tests.support.scored.ScoredClassifier", "trust=true", "tracking=none")
TARS = ("data.root=tars", "data.index=index", "data.image_size=32", "data.batch_size=4")  # three steps an epoch


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Twelve images to train on, in three classes; the folder of `train`."""
    write_tar(tmp_path / "tars" / "train-0.tar", make_samples(12))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "key", "epoch", "best"),
    [
        ("loss", "val/loss", 3, "lowest"),
        ("f1", "val/f1_macro", 1, "highest"),
        ("val/balanced_accuracy", "val/balanced_accuracy", None, "highest"),
    ],
)
def test_the_best_checkpoint_is_that_of_the_chosen_metric(
    train: Typed, tars: Path, name: str, key: str, epoch: int | None, best: str
) -> None:
    write_tar(tars / "tars" / "val-0.tar", make_samples(4))
    printed = train(*SCRIPTED, *TARS, "recipe.epochs=6", "name=mine", f"choose_by={name}")
    run = tars / "runs" / "mine"
    assert f"evaluation  4 images of split val; the best checkpoint has the {best} {key}\n" in printed
    assert [line["step"] for line in journal(run) if key in line] == [3, 6, 9, 12, 15, 18]
    result = json.loads((run / "result.json").read_text())
    assert result["chosen_by"] == key
    if epoch is None:  # NaN in every epoch
        assert (result[key], result["val/top1"]) == (None, None)
        assert result["checkpoint"] == "runs/mine/checkpoints/last.ckpt"
        assert f"best {key}  none: no evaluation had a finite value, so the checkpoint is the last one" in printed
        return
    saved = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert saved["global_step"] == 3 * epoch
    assert (result[key], result["val/top1"]) == (SCORES[key][epoch - 1], SCORES["val/top1"][epoch - 1])
    assert f"  {result[key]:.4f} on 4 images of split val; its val/top1 is {result['val/top1']:.4f}\n" in printed


@pytest.mark.parametrize("splits", [("test",), ("val", "test"), ("val",)])
def test_only_a_missing_validation_split_lets_the_test_split_choose(
    train: Typed, tars: Path, splits: tuple[str, ...]
) -> None:
    for split in splits:
        write_tar(tars / "tars" / f"{split}-0.tar", make_samples(4 if split == "val" else 5))
    printed = train("+model=lenet", "tracking=none", *TARS, "recipe.epochs=1")
    cautions = [line for line in printed.splitlines() if line.startswith("caution")]
    if "val" in splits:
        assert printed.count("4 images of split val") == 2
        assert cautions == []
    else:
        assert printed.count("5 images of split test") == 2
        (caution,) = cautions
        assert "the best checkpoint is chosen on the test split, so its score is no honest estimate" in caution


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["stop_early=3"],
            "stop_early=3 needs an evaluation, and tars has no split val or test: leave stop_early out,",
        ),
        (["choose_by=f1"], "choose_by=val/f1_macro needs an evaluation, and tars has no split val or test: leave"),
    ],
)
def test_a_choice_needs_a_split_that_evaluates(train: Typed, tars: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        train("+model=lenet", *TARS, *words)
    assert not (tars / "runs").exists()
    assert "none: no split val or test" in train("+model=lenet", "tracking=none", *TARS, "recipe.epochs=1")


def test_without_an_evaluation_finetuning_keeps_its_averaged_weights(train: Typed, tars: Path) -> None:
    printed = train("+model=lenet", "tracking=none", *TARS, "recipe=finetune", "recipe.epochs=2", "name=mine")
    assert "averaging   off: 6 steps are fewer than 10 windows" in printed
    words = ("averaging.min_windows=0", "recipe.epochs=2", "name=averaged")
    train("+model=lenet", "tracking=none", *TARS, "recipe=finetune", *words)
    net, _ = RestoredRun(tars / "runs" / "averaged").load_network()
    state = torch.load(tars / "runs" / "averaged" / "checkpoints" / "last.ckpt", weights_only=True)
    assert torch.equal(net.stem[0].weight, state["state_dict_ema"]["stem.0.weight"])
    assert not torch.equal(net.stem[0].weight, state["state_dict"]["net.stem.0.weight"])


def test_few_classes_have_no_top5(train: Typed, tars: Path) -> None:
    write_tar(tars / "tars" / "val-0.tar", make_samples(4))
    with pytest.raises(
        ValueError, match=r"^choose_by=val/top5 needs more than five classes, and tars has 3: choose_by="
    ):
        train("+model=lenet", *TARS, "choose_by=top5")
    assert not (tars / "runs").exists()
