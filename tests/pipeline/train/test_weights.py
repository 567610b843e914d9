"""Trainings that start with a file of weights, and image sizes that a network does not accept."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
import torchvision
from hydra.errors import HydraException

from pipeline.cli.compose import compose
from tests.support.commands import Typed, journal
from tests.support.shards import make_samples, write_tar


def test_a_training_starts_with_the_weights_of_a_run(train: Typed, with_digits: Path) -> None:
    short = ("+model=mobilenet", "model.variant=mobilenet_v3_small", "+trainer.limit_train_batches=2", "tracking=none")
    began = train(*short, "name=first", "recipe.epochs=2", "model.norm_eps=1.0e-5")
    assert "\nnorms       momentum 0.5 instead of 0.01, for a training of 4 batches\n" in began
    assert "\nrate        0.008 (0.016 for 256 images a step, scaled to 64 by the root of their ratio)\n" in began
    first = with_digits / "runs" / "first" / "checkpoints" / "last.ckpt"
    frozen = ("recipe.epochs=1", "recipe.optimizer.lr=0", "model.norm_momentum=1.0e-12", "name=second")
    printed = train(*short, *frozen, f"weights={first}")
    assert "244 tensors loaded in state_dict, named as by convoy; batch norm eps 1e-05" in printed
    assert "strides" not in printed
    assert "\nnorms       momentum 1e-12 as given; after all 2 batches 100.0% of an average is as it began\n" in printed
    assert "\nrate        0 (as given)\n" in printed
    # In bfloat16 oneDNN's weight gradient of a strided convolution of a single pixel reads memory that nobody wrote.
    large = ("recipe.epochs=1", "model.image_size=224", "trainer.precision=32-true", "name=wide")
    wide = train(*short, *large, f"weights={first}")
    assert re.search("strides +those for images of 224 pixels, not those with which", wide)
    ends = [journal(with_digits / "runs" / name)[-1] for name in ("first", "second")]
    assert ends[1]["val/loss"] == pytest.approx(ends[0]["val/loss"], rel=1e-5)
    assert ends[1]["val/top1"] == ends[0]["val/top1"]
    fingerprint = json.loads((with_digits / "runs" / "second" / "fingerprint.json").read_text())
    assert fingerprint["weights.sha256"] == hashlib.sha256(first.read_bytes()).hexdigest()
    assert "weights.file" not in fingerprint
    # A resumed run needs its file no more, wherever it is; a digest replaces a lost one.
    result = with_digits / "runs" / "second" / "result.json"
    result.unlink()
    moved = first.rename(with_digits / "elsewhere.ckpt")
    assert "is not read: the run continues" in train(*short, *frozen, f"weights={moved}")
    result.unlink()
    moved.unlink()
    digest = fingerprint["weights.sha256"].upper()
    assert "is not read: the run continues" in train(*short, *frozen, f"weights={moved}", f"weights.sha256={digest}")


def test_fine_tuning_needs_no_number(train: Typed, with_digits: Path) -> None:
    train("+model=lenet", "tracking=none", "recipe.epochs=1", "name=first")
    for split, count in (("train", 12), ("val", 6)):  # of the classes 0 to 2
        write_tar(with_digits / "tars" / f"{split}-0.tar", make_samples(count))
    words = ("+model=lenet", "recipe=finetune", "data.root=tars", "data.image_size=32", "data.batch_size=4")
    few = ("recipe.epochs=2", "tracking=none")
    printed = train(*words, *few, "weights=runs/first/checkpoints/best.ckpt", "name=tuned")
    assert "\nhead        rows of 0, 1, 2 copied by class name\n" in printed
    assert "\ntuning      the head alone in the first 1 steps; each stage at 0.7 of the rate of the next\n" in printed
    assert "\nfew images  " not in printed
    other = train(*words, *few, "name=random")
    assert "\nweights     none: this recipe is for trained ones, add weights=FILE\n" in other
    config = compose("train", ["data=shards", *words])
    assert config.recipe.epochs == 20, "without a number, there are few epochs"


def test_few_images_for_a_network_are_pointed_out(train: Typed, with_digits: Path) -> None:
    for split, count in (("train", 40), ("test", 4)):
        write_tar(with_digits / "tars" / f"{split}-0.tar", make_samples(count, classes=2))
    words = ("+model=lenet", "data.root=tars", "data.image_size=32", "recipe.epochs=1", "tracking=none")
    printed = train(*words, "data.batch_size=8")
    assert "\nfew images  40 for 61,326 random parameters: weights=FILE recipe=finetune starts with trained" in printed
    printed = train("+model=lenet", "recipe.epochs=1", "tracking=none", "recipe.freeze=[stem]")
    assert "\nfew images  " not in printed  # 1,438 digits
    assert "\nweights     none: frozen parts keep random values, add weights=FILE\n" in printed


def test_weights_that_do_not_fit_leave_no_run(train: Typed, with_digits: Path) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), with_digits / "resnet18.pth")
    for words, message in (
        (["weights=none.pth"], "weights=none.pth: there is no such file"),
        (["weights=a=b.pth"], "weights=a=b.pth: there is no such file"),
        (["weights=12"], "weights=12: there is no such file"),
        (["weights=it's (1) #2.pth"], "weights=it's (1) #2.pth: there is no such file"),
        (["weights.file=epoch=3.ckpt"], "weights=epoch=3.ckpt: there is no such file"),
        (["weights=moved.pth", f"weights.sha256={'0' * 64}"], "weights=moved.pth: there is no such file"),
        (["weights=resnet18.pth", "weights.sha256=12e45678"], "not weights.sha256=12e45678"),
        (["weights.head=replace"], "weights.head=replace needs a file: add weights=FILE"),
        (["weights.sha256=0123"], "weights.sha256=0123 needs a file: add weights=FILE"),
        (["weights=resnet18.pth"], "built for small images, model.image_size=224 builds the published one"),
        (["weights=resnet18.pth", "model.image_size=224"], "weights.head=replace leaves out the last layer"),
        (["weights=resnet18.pth", "weights.sha256=00"], "not weights.sha256=0"),
        (["weights=resnet18.pth", "weights.head=drop"], "weights.head=drop is not one of keep, replace, auto"),
    ):
        with pytest.raises((ValueError, OSError)) as error:
            train("+model=resnet", "tracking=none", *words)
        assert message in str(error.value)
        assert not (with_digits / "runs").exists()


def test_an_unsuitable_image_size_is_refused(train: Typed, with_digits: Path) -> None:
    for words, message in (
        (["+model=vgg", "model.image_size=224"], "data.image_size=16 does not suit vgg11_bn, built for 224"),
        (["+model=lenet", "data.image_size=16"], "data.image_size=16 must be 28 or 32 pixels for LeNet-5"),
        (["+model=convnext", "data.image_size=7"], "data.image_size=7 must be at least 8 for this network"),
        (["+model=vgg", "augment.evaluation.image_size=8"], "data.image_size=8 does not suit vgg11_bn, built for 16"),
    ):
        with pytest.raises((ValueError, HydraException)) as error:
            train(*words, "tracking=none")
        assert message in str(error.value)
        assert not (with_digits / "runs").exists()
