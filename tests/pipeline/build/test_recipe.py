"""Recipes from configs: their parts combine freely, and cost nothing when they are called."""

from __future__ import annotations

from functools import partial

import pytest

from pipeline.build.network import build_recipe
from pipeline.cli.compose import choices, compose

PARTS = ("optimizer", "schedule", "loss")


@pytest.mark.parametrize("recipe", choices("recipe"))
def test_every_part_replaces_that_of_every_recipe(recipe: str) -> None:
    changes = [(part, choice) for part in PARTS for choice in choices(part)]
    assert len(changes) >= 12
    for part, choice in changes:
        config = compose("train", ["+model=resnet", f"recipe={recipe}", f"{part}={choice}"])
        build_recipe(config)
        # Another recipe changes nothing of the part, only the data may.
        values = {name: value for name, value in config.recipe[part].items() if name != "warmup_epochs"}
        alone = compose("train", ["+model=resnet", "recipe=sgd", f"{part}={choice}"]).recipe[part]
        assert values == {name: value for name, value in alone.items() if name != "warmup_epochs"}, (part, choice)


def test_parts_are_called_without_hydra() -> None:
    recipe = build_recipe(compose("train", ["+model=resnet"]))
    assert [type(getattr(recipe, part)) for part in PARTS] == [partial] * 3
    assert recipe.optimizer.keywords["lr"] == 0.1
    assert recipe.loss.keywords == {"label_smoothing": 0.1}
