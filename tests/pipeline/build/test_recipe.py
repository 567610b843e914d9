"""Recipes from configs: their parts combine freely, and cost nothing when they are called."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from data.shards.dataset import Dataset
from models.learning.mixing import Mixing
from pipeline.build.network import build_recipe, count_classes
from pipeline.cli.check import check_command_line
from pipeline.cli.compose import choices, compose
from pipeline.cli.errors import ConfigError
from pipeline.train.__main__ import VERB

KEYS = {
    "optimizer": ("optimizer", "base_lr", "base_batch_size", "lr_scaling"),
    "schedule": ("schedule", "warmup", "warmup_epochs", "warmup_steps"),
    "loss": ("loss",),
    "mix": ("mix",),
}
PARTS = tuple(KEYS)
WITH_VALUES = [one for one in choices("experiment") if not one.startswith("cifar10_")] + ["cifar10_resnet18"]
COMPOSED = (*PARTS, "averaging", "augment", "fit", "policy", "erasing")


@pytest.mark.parametrize("recipe", choices("recipe"))
def test_every_part_replaces_that_of_every_recipe(recipe: str) -> None:
    rounds = max(len(choices(part)) for part in PARTS)  # until every choice has had its turn
    assert rounds >= 9
    for number in range(rounds):
        words = [f"{part}={choices(part)[number % len(choices(part))]}" for part in PARTS]
        config, expected = compose("train", ["+model=resnet", f"recipe={recipe}", *words]), alone(*words)
        build_recipe(config)
        for key in (key for keys in KEYS.values() for key in keys):
            assert config.recipe[key] == expected.recipe[key], (words, key)


@lru_cache
def alone(*words: str) -> DictConfig:
    """A config with these parts beside the values of one recipe."""
    return compose("train", ["+model=resnet", "recipe=sgd", *words])


@pytest.mark.parametrize("position", [0, -1])
@pytest.mark.parametrize("experiment", WITH_VALUES)
def test_every_part_replaces_that_of_every_experiment(experiment: str, position: int) -> None:
    words = [f"{part}={choices(part)[position]}" for part in COMPOSED]
    typed = ["data.root=photos", f"+experiment={experiment}", *words]
    config = compose("train", check_command_line(VERB, typed))
    build_recipe(config)
    own = compose("train", [f"+experiment={experiment}"], with_hydra=True)
    expected = compose("train", [f"data={own.hydra.runtime.choices.data}", *words])
    for key in ("recipe.optimizer", "recipe.schedule", "recipe.loss", "recipe.mix", "augment", "averaging"):
        assert OmegaConf.select(config, key) == OmegaConf.select(expected, key), key
    assert config.choose_by == (own if config.averaging else expected).choose_by
    for part in PARTS:
        for key in KEYS[part]:
            assert config.recipe[key] == expected.recipe[key], key


def test_values_that_are_typed_beside_an_experiment_and_a_part_count() -> None:
    words = ["data.root=photos", "+experiment=torchvision_v2", "optimizer=adamw", "recipe.optimizer.weight_decay=0.1"]
    recipe = compose("train", check_command_line(VERB, words)).recipe
    assert (recipe.optimizer.weight_decay, recipe.base_lr, recipe.epochs) == (0.1, 0.004, 600)
    both = compose(
        "train", check_command_line(VERB, ["data.root=photos", "+experiment=timm_a2", "recipe=adamw"])
    ).recipe
    alone = compose("train", ["recipe=adamw"]).recipe
    assert all(both[key] == alone[key] for part in ("optimizer", "schedule", "loss") for key in KEYS[part])
    assert both.epochs == 300
    tuned = compose("train", check_command_line(VERB, ["data.root=photos", "+experiment=timm_a2", "recipe=finetune"]))
    assert (tuned.recipe.epochs, tuned.recipe.clip_norm, tuned.choose_by) == (20, 1.0, "val_ema/top1")
    with pytest.raises(ConfigError, match=r"^no sweep over mix here: an experiment has values of its own"):
        check_command_line(VERB, ["data.root=photos", "+experiment=timm_a2", "mix=none,mixup", "-m"])


def test_parts_are_called_without_hydra() -> None:
    recipe = build_recipe(compose("train", ["+model=resnet"]))
    assert [type(getattr(recipe, part)) for part in ("optimizer", "schedule", "loss")] == [partial] * 3
    assert recipe.optimizer.keywords["momentum"] == 0.9
    assert recipe.loss.keywords == {"label_smoothing": 0.1}


def test_images_are_mixed_where_the_config_says_so() -> None:
    expected = {
        "none": None,
        "mixup": Mixing(mixup_alpha=0.2),
        "cutmix": Mixing(cutmix_alpha=1.0),
        "mixup_cutmix": Mixing(mixup_alpha=0.2, cutmix_alpha=1.0),
    }
    assert {
        one: build_recipe(compose("train", ["+model=resnet", f"mix={one}"])).mix for one in choices("mix")
    } == expected
    assert build_recipe(compose("train", ["+model=resnet"])).mix is None


def test_one_class_leaves_nothing_to_mix() -> None:
    dataset = Dataset(Path(), Path(), "cats", ("cat",), (0, 0, 0), (1, 1, 1), {})
    with pytest.raises(ValueError, match=r"^cats has one class: put its images into two or more"):
        count_classes(compose("train", ["+model=resnet", "mix=mixup"]), dataset)
