"""What a study finds in a training before anything runs."""

from __future__ import annotations

import re

import pytest
from omegaconf import OmegaConf

from pipeline.cli.compose import compose
from pipeline.train.check import check_training


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+model=lenet", "data.image_size=31"], "data.image_size=31 must be 28 or 32 pixels for LeNet-5"),
        (["+model=alexnet", "model.dropout=7"], "model.dropout=7 must be at least 0 and less than 1"),
        (["+model=resnet", "recipe.optimizer.lr=-3"], "recipe.optimizer=SGD: Invalid learning rate: -3"),
        (["+model=resnet", "augment.training.flip=2"], "augment.training.flip=2 must be"),
        (["+model=resnet", "choose_by=val/top2"], "choose_by=val/top2 "),
        (["+model=resnet", "weights.head=replace"], "weights.head=replace needs a file: add weights=FILE"),
        (["+model=resnet", "weights.head=drop"], "weights.head=drop is not one of keep, replace, auto"),
        (["+model=resnet", "recipe.freeze=[stage9]"], "recipe.freeze=stage9 is not one of stem, stage1, stage2, "),
        (["+model=resnet", "recipe.freeze=stem"], "recipe.freeze=stem must be a list of parts of the network, as in ["),
        (
            ["+model=resnet", "recipe.head_warmup=1"],
            "recipe.head_warmup=1 must be a fraction of the training, at least",
        ),
        (["+model=resnet", "recipe.layer_decay=0"], "recipe.layer_decay=0 must be a number above 0 and at most 1, or"),
        (["+model=resnet", "budget=20"], "budget=20 must be a time, as 90s, 20m or 2.5h"),
        (["+model=resnet", "+trainer.limit_train_batchs=1"], "there is no trainer.limit_train_batchs: did you mean"),
        (["+model=resnet", "+trainer.max_epochs=1"], "trainer.max_epochs is set by recipe.epochs: leave it out"),
    ],
)
def test_a_mistake_is_found_without_the_data(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        check_training(compose("train", words))


def test_a_network_that_takes_its_classes_from_the_data_is_accepted() -> None:
    config = compose("train", ["+model=resnet"])
    config.model = OmegaConf.create({"_target_": "torchvision.models.resnet18", "num_classes": None})
    check_training(config)
