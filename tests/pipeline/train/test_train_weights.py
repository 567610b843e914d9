"""Trainings that begin with a file of weights, and images that a network cannot take."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
import torchvision
from hydra.errors import HydraException

from tests.pipeline.conftest import Train, journal


def test_a_training_begins_with_the_weights_of_a_run(train: Train, with_digits: Path) -> None:
    short = ("+model=mobilenet", "model.variant=mobilenet_v3_small", "+trainer.limit_train_batches=2", "tracking=none")
    train(*short, "name=first", "recipe.epochs=2", "model.norm_eps=1.0e-5")
    first = with_digits / "runs" / "first" / "checkpoints" / "last.ckpt"
    frozen = ("recipe.epochs=1", "recipe.optimizer.lr=0", "model.norm_momentum=1.0e-12", "name=second")
    printed = train(*short, *frozen, f"weights={first}")
    assert "244 tensors loaded in state_dict, named as by convoy; batch norm eps 1e-05" in printed
    assert "strides" not in printed
    wide = train(*short, "recipe.epochs=1", "model.image_size=224", f"weights={first}", "name=wide")
    assert re.search("strides +those for images of 224 pixels, not those with which", wide)
    ends = [journal(with_digits / "runs" / name)[-1] for name in ("first", "second")]
    assert ends[1]["val/loss"] == pytest.approx(ends[0]["val/loss"], rel=1e-5)
    assert ends[1]["val/top1"] == ends[0]["val/top1"]
    fingerprint = json.loads((with_digits / "runs" / "second" / "fingerprint.json").read_text())
    assert fingerprint["weights.sha256"] == hashlib.sha256(first.read_bytes()).hexdigest()
    assert "weights.file" not in fingerprint
    # Cut short, it goes on with its own weights, wherever the file has gone; its digest stands for one that is lost.
    result = with_digits / "runs" / "second" / "result.json"
    result.unlink()
    moved = first.rename(with_digits / "elsewhere.ckpt")
    assert "not read from" in train(*short, *frozen, f"weights={moved}")
    result.unlink()
    moved.unlink()
    digest = fingerprint["weights.sha256"].upper()
    assert "not read from" in train(*short, *frozen, f"weights={moved}", f"weights.sha256={digest}")


def test_weights_that_do_not_fit_leave_no_run(train: Train, with_digits: Path) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), with_digits / "resnet18.pth")
    for words, message in (
        (["weights=none.pth"], "weights=none.pth: there is no such file"),
        (["weights=a=b.pth"], "weights=a=b.pth: there is no such file"),
        (["weights=12"], "weights=12: there is no such file"),
        (["weights=it's (1) #2.pth"], "weights=it's (1) #2.pth: there is no such file"),
        (["weights.file=epoch=3.ckpt"], "weights=epoch=3.ckpt: there is no such file"),
        (["weights=moved.pth", f"weights.sha256={'0' * 64}"], "weights=moved.pth: there is no such file"),
        (["weights=resnet18.pth", "weights.sha256=12e45678"], "not weights.sha256=12e45678"),
        (["weights.head=replace"], "weights.head=replace is for a file: add weights=FILE"),
        (["weights.sha256=0123"], "weights.sha256=0123 is for a file: add weights=FILE"),
        (["weights=resnet18.pth"], "built for small images, model.image_size=224 builds the published one"),
        (["weights=resnet18.pth", "model.image_size=224"], "weights.head=replace leaves out the last layer"),
        (["weights=resnet18.pth", "weights.sha256=00"], "not weights.sha256=0"),
        (["weights=resnet18.pth", "weights.head=drop"], "weights.head=drop must be keep or replace"),
    ):
        with pytest.raises((ValueError, OSError)) as error:
            train("+model=resnet", "tracking=none", *words)
        assert message in str(error.value)
        assert not (with_digits / "runs").exists()


def test_an_image_size_that_the_network_cannot_take_is_answered(train: Train, with_digits: Path) -> None:
    for words, message in (
        (["+model=vgg", "model.image_size=224"], "data.image_size=16 is no size for vgg11_bn, built for 224"),
        (["+model=lenet", "data.image_size=16"], "image_size=16: LeNet-5 takes images of 28 or 32 pixels"),
        (["+model=convnext", "data.image_size=7"], "image_size=7: this network takes images of 8 pixels and more"),
        (["+model=vgg", "augment.evaluation.image_size=8"], "data.image_size=8 is no size for vgg11_bn, built for 16"),
    ):
        with pytest.raises((ValueError, HydraException)) as error:
            train(*words, "tracking=none")
        assert message in str(error.value)
        assert not (with_digits / "runs").exists()
