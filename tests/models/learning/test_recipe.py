"""Schedules against closed forms and torch's schedulers; refused recipes."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.learning.losses import cross_entropy
from models.learning.recipe import warmup_cosine, warmup_exponential, warmup_milestones
from pipeline.cli.compose import compose
from tests.support.networks import make_recipe


def test_the_cosine_schedule_rises_and_falls() -> None:
    factors = [
        warmup_cosine(step, steps_per_epoch=10, num_steps=60, warmup_epochs=2, final_fraction=0.1) for step in range(61)
    ]
    assert factors[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert factors[40] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert factors[60] == pytest.approx(0.1)
    assert all(before >= after for before, after in itertools.pairwise(factors[20:]))


def test_the_exponential_schedule_is_the_papers() -> None:
    """0.97 every 2.4 epochs (Tan & Le 2019), over 350 epochs of 10 steps."""
    for epoch in (5, 53, 197, 350):
        factor = warmup_exponential(
            epoch * 10, steps_per_epoch=10, num_steps=3500, warmup_epochs=0, final_fraction=0.97 ** (350 / 2.4)
        )
        assert factor == pytest.approx(0.97 ** (epoch / 2.4))
    rising = [warmup_exponential(step, steps_per_epoch=10, num_steps=100, warmup_epochs=2) for step in range(20)]
    assert rising == pytest.approx([(step + 1) / 20 for step in range(20)])


def test_the_milestones_are_torchvisions() -> None:
    """`StepLR(step_size=30, gamma=0.1)` over 90 epochs of 7 steps, which torchvision steps once per epoch."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.1)
    third, two_thirds = compose("train", ["+model=vgg"]).recipe.schedule.milestones
    for epoch in range(90):
        for step in range(7 * epoch, 7 * epoch + 7):
            factor = warmup_milestones(step, steps_per_epoch=7, num_steps=630, milestones=(third, two_thirds))
            assert factor == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("warmup_epochs", "num_steps", "rises"),
    [(0, 60, False), (5, 60, False), (6, 60, True), (9, 60, True), (9, 1, False)],
)
def test_a_warm_up_as_long_as_the_training_rises_until_the_end(
    warmup_epochs: float, num_steps: int, rises: bool
) -> None:
    recipe = make_recipe(schedule=partial(warmup_cosine, warmup_epochs=warmup_epochs))
    assert recipe.rises_until_end(10, num_steps) is rises


def test_the_default_loss_is_torchs_cross_entropy_per_image() -> None:
    logits, labels = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 5
    for smoothing in (0.0, 0.1):
        expected = functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        assert torch.equal(cross_entropy(logits, labels, label_smoothing=smoothing), expected)
    assert make_recipe().loss is cross_entropy


def test_a_loss_for_another_number_of_classes_is_accepted() -> None:
    weighted = nn.CrossEntropyLoss(weight=torch.ones(10), reduction="none")
    assert make_recipe(loss=weighted).loss is weighted


def total(logits: Tensor, labels: Tensor) -> float:
    return functional.cross_entropy(logits, labels).item()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "^epochs=0 must be at least 1"),
        ({"clip_norm": 0.0}, "^clip_norm=0.0 must be a number above 0, or null"),
        ({"optimizer": partial(torch.optim.SGD, rate=1)}, "^optimizer=SGD: .* unexpected keyword argument 'rate'"),
        (
            {"schedule": partial(warmup_cosine, rise=1)},
            "^schedule=warmup_cosine: .* unexpected keyword argument 'rise'",
        ),
        (
            {"loss": partial(cross_entropy, label_smoothing=1.0)},
            "^loss=cross_entropy: loss.label_smoothing=1.0 must be ",
        ),
        ({"loss": partial(cross_entropy, label_smoothing=-0.1)}, "label_smoothing=-0.1 must be at least 0 and less th"),
        (
            {"loss": partial(cross_entropy, smoothing=0.1)},
            "^loss=cross_entropy: .* unexpected keyword argument 'smooth",
        ),
        ({"loss": functional.cross_entropy}, r"one loss per image, \(N,\), and returns the shape \(\) for 2 images"),
        ({"loss": nn.CrossEntropyLoss()}, r"^loss=CrossEntropyLoss\(\): it must return one loss per image"),
        ({"loss": total}, "^loss=total: it must return one loss per image"),
    ],
)
def test_an_impossible_recipe_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_recipe(**wrong)
