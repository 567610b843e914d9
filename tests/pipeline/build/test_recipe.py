"""Recipes from configs: their parts combine freely, and cost nothing when they are called."""

from __future__ import annotations

from functools import partial

import pytest

from pipeline.build.network import build_recipe
from pipeline.cli.compose import choices, compose

KEYS = {
    "optimizer": ("optimizer", "base_lr", "base_batch_size", "lr_scaling"),
    "schedule": ("schedule", "warmup", "warmup_epochs", "warmup_steps"),
    "loss": ("loss",),
}
PARTS = tuple(KEYS)


@pytest.mark.parametrize("recipe", choices("recipe"))
def test_every_part_replaces_that_of_every_recipe(recipe: str) -> None:
    changes = [(part, choice) for part in PARTS for choice in choices(part)]
    assert len(changes) >= 12
    for part, choice in changes:
        config = compose("train", ["+model=resnet", f"recipe={recipe}", f"{part}={choice}"])
        build_recipe(config)
        alone = compose("train", ["+model=resnet", "recipe=sgd", f"{part}={choice}"])
        for key in KEYS[part]:
            assert config.recipe[key] == alone.recipe[key], (part, choice, key)


def test_parts_are_called_without_hydra() -> None:
    recipe = build_recipe(compose("train", ["+model=resnet"]))
    assert [type(getattr(recipe, part)) for part in PARTS] == [partial] * 3
    assert recipe.optimizer.keywords["momentum"] == 0.9
    assert recipe.loss.keywords == {"label_smoothing": 0.1}
