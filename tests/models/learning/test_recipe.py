"""Schedules against closed forms and torch's schedulers; refused recipes."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import timm.optim
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.learning.losses import binary_cross_entropy, cross_entropy
from models.learning.mixing import Mixing
from models.learning.schedules import cosine, exponential, milestones
from pipeline.build.network import build_recipe
from pipeline.cli.compose import compose
from tests.support.networks import make_recipe


def factors(num_steps: int, **changes: object) -> list[float]:
    """The factors of a recipe at each step, 10 steps an epoch."""
    recipe = make_recipe(**changes)
    return [recipe.lr_factor(step, steps_per_epoch=10, num_steps=num_steps) for step in range(num_steps + 1)]


@pytest.mark.parametrize("length", [{"warmup": 1 / 3}, {"warmup_epochs": 2}, {"warmup": 0.9, "warmup_steps": 20}])
def test_the_cosine_schedule_rises_and_falls(length: dict[str, float]) -> None:
    found = factors(60, schedule=partial(cosine, final_fraction=0.1), **length)
    assert found[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert found[40] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert found[60] == pytest.approx(0.1)
    assert all(before >= after for before, after in itertools.pairwise(found[20:]))


def test_the_cosine_is_torchs() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30, eta_min=0.01)
    for found in factors(30, schedule=partial(cosine, final_fraction=0.01)):
        assert found == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_the_exponential_schedule_is_the_papers() -> None:
    """0.97 every 2.4 epochs (Tan & Le 2019), over 350 epochs of 10 steps."""
    found = factors(3500, schedule=partial(exponential, final_fraction=0.97 ** (350 / 2.4)))
    for epoch in (5, 53, 197, 350):
        assert found[epoch * 10] == pytest.approx(0.97 ** (epoch / 2.4))


def test_the_milestones_are_torchvisions() -> None:
    """`StepLR(step_size=30, gamma=0.1)` over 90 epochs of 10 steps, which torchvision steps once per epoch."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.1)
    configured = compose("train", ["+model=vgg"]).recipe.schedule.milestones
    found = factors(900, schedule=partial(milestones, milestones=configured))
    for epoch in range(90):
        assert found[10 * epoch : 10 * epoch + 10] == pytest.approx([optimizer.param_groups[0]["lr"]] * 10)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("warmup_epochs", "num_steps", "rises"),
    [(0, 60, False), (5, 60, False), (6, 60, True), (9, 60, True), (9, 1, False)],
)
def test_a_warm_up_as_long_as_the_training_rises_until_the_end(
    warmup_epochs: float, num_steps: int, rises: bool
) -> None:
    recipe = make_recipe(schedule=cosine, warmup_epochs=warmup_epochs)
    assert recipe.rises_until_end(10, num_steps) is rises


@pytest.mark.parametrize(
    ("words", "images", "rate", "origin"),
    [
        ((), 256, 0.256, "0.256 for 256 images a step"),
        ((), 64, 0.064, "0.256 for 256 images a step, scaled to 64 by their ratio"),
        (
            ("recipe.lr_scaling=sqrt",),
            1024,
            0.512,
            "0.256 for 256 images a step, scaled to 1,024 by the root of their ratio",
        ),
        (("recipe.lr_scaling=none",), 64, 0.256, "0.256 for 256 images a step, not scaled to 64"),
        (("recipe.optimizer.lr=0.3",), 64, 0.3, "as given"),
        (
            ("optimizer=adamw",),
            1024,
            0.002,
            "0.004 for 4,096 images a step, scaled to 1,024 by the root of their ratio",
        ),
    ],
)
def test_the_learning_rate_follows_the_batch_unless_it_is_given(
    words: tuple[str, ...], images: int, rate: float, origin: str
) -> None:
    recipe = build_recipe(compose("train", ["+model=resnet", *words]))
    assert recipe.learning_rate(images) == (pytest.approx(rate), origin)
    groups = [{"params": [nn.Parameter(torch.zeros(1))]}]
    (group,) = recipe.optimizer_factory(images)(groups).param_groups
    assert group["lr"] == pytest.approx(rate)


def test_an_optimizer_without_a_rate_keeps_its_own() -> None:
    recipe = make_recipe(optimizer=torch.optim.Adam)
    assert recipe.learning_rate(64) is None
    assert recipe.optimizer_factory(64)([nn.Parameter(torch.zeros(1))]).defaults["lr"] == 1e-3


def test_the_default_loss_is_torchs_cross_entropy_per_image() -> None:
    logits, labels = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 5
    for smoothing in (0.0, 0.1):
        expected = functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        assert torch.equal(cross_entropy(logits, labels, label_smoothing=smoothing), expected)
    assert make_recipe().loss is cross_entropy


def test_a_loss_for_another_number_of_classes_is_accepted() -> None:
    weighted = nn.CrossEntropyLoss(weight=torch.ones(10), reduction="none")
    assert make_recipe(loss=weighted).loss is weighted


@pytest.mark.parametrize("loss", [cross_entropy, binary_cross_entropy, nn.CrossEntropyLoss(reduction="none")])
def test_losses_of_probabilities_are_accepted_for_mixed_images(loss: nn.Module) -> None:
    assert make_recipe(loss=loss, mix=Mixing(mixup_alpha=1.0)).loss is loss


def total(logits: Tensor, labels: Tensor) -> float:
    return functional.cross_entropy(logits, labels).item()


def by_place(logits: Tensor, labels: Tensor) -> Tensor:
    return -logits.log_softmax(1)[torch.arange(len(labels)), labels]


def of_the_first(logits: Tensor, labels: Tensor) -> Tensor:
    return by_place(logits, labels if labels.ndim == 1 else labels[:, 0].long())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "^epochs=0 must be from 1 to 1,000,000"),
        ({"epochs": 10**20}, "^epochs=100000000000000000000 must be from 1 to 1,000,000"),
        (
            {"optimizer": partial(torch.optim.SGD, lr="fast")},
            "^optimizer.lr=fast must be a number, or null for base_lr",
        ),
        ({"optimizer": partial(torch.optim.SGD, lr=math.nan)}, "^optimizer.lr=nan must be a number"),
        ({"base_lr": 0.0}, "^base_lr=0.0 must be a number above 0, or null for the optimizer's default"),
        ({"base_lr": math.nan}, "^base_lr=nan must be a number above 0"),
        ({"base_batch_size": 0}, "^base_batch_size=0 must be at least 1"),
        ({"lr_scaling": "root"}, "^lr_scaling=root is not one of linear, sqrt, none"),
        ({"warmup": 5}, "^warmup=5 must be a fraction of the training, from 0 to 1"),
        ({"lr_scaling": ["sqrt"]}, r"^lr_scaling=\['sqrt'\] is not one of linear, sqrt, none"),
        ({"warmup_epochs": -1}, "^warmup_epochs=-1 must be a number of at least 0"),
        ({"warmup_epochs": "two"}, "^warmup_epochs=two must be a number of at least 0"),
        ({"warmup_steps": 2.5}, "^warmup_steps=2.5 must be an integer of at least 0, or null for the fraction$"),
        ({"mix": {"mixup_alpha": 0.1}}, "^mix={'mixup_alpha': 0.1} must be chosen by mix=, or null$"),
        ({"warmup_epochs": 1, "warmup_steps": 9}, "^warmup_steps=9 does not go with warmup_epochs"),
        ({"clip_norm": 0.0}, "^clip_norm=0.0 must be a number above 0, or null"),
        ({"optimizer": partial(torch.optim.SGD, rate=1)}, "^optimizer=SGD: .* unexpected keyword argument 'rate'"),
        ({"optimizer": partial(torch.optim.AdamW, betas=[0.9])}, "^optimizer=AdamW: list index out of range"),
        (
            {"optimizer": partial(torch.optim.SGD, momentum=math.nan)},
            "^optimizer=SGD: a step with a gradient of 0.5 mak",
        ),
        ({"optimizer": partial(torch.optim.SGD, weight_decay=math.inf)}, "^optimizer=SGD: a step with a gradient of 0"),
        (
            {"optimizer": partial(torch.optim.RMSprop, alpha=2)},
            "^optimizer=RMSprop: a step with a gradient of 0.5 make",
        ),
        ({"optimizer": partial(timm.optim.Muon, adjust_lr_fn="no")}, '^optimizer=Muon: Invalid scaling function "no"'),
        ({"optimizer": partial(timm.optim.Lamb, betas=[1, 2])}, "^optimizer=Lamb: result type Complex"),
        ({"schedule": partial(cosine, final_fraction=-1)}, "^schedule=cosine: schedule.final_fraction=-1 must be the "),
        (
            {"schedule": partial(exponential, final_fraction=math.nan)},
            "schedule.final_fraction=nan must be the last ra",
        ),
        ({"schedule": partial(milestones, factor=-1)}, "schedule.factor=-1 must be a number from 0 to 1"),
        ({"schedule": partial(milestones, milestones=["a"])}, r"schedule.milestones=\['a'\] must be rising fractions"),
        ({"schedule": partial(milestones, milestones=[0.9, 0.1])}, r"schedule.milestones=\[0.9, 0.1\] must be rising"),
        ({"schedule": lambda progress: 0.5 - progress}, "schedule=-0.5 must be a factor of at least 0, after 100% of"),
        (
            {"schedule": partial(cosine, rise=1)},
            "^schedule=cosine: .* unexpected keyword argument 'rise'",
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
        (
            {"loss": by_place, "mix": Mixing(mixup_alpha=1.0)},
            r"^loss=by_place: mixed images need a loss that takes probabilities \(N, K\) as labels, such as cr",
        ),
        ({"loss": of_the_first, "mix": Mixing(mixup_alpha=1.0)}, "^loss=of_the_first: mixed images need a loss that"),
    ],
)
def test_an_impossible_recipe_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_recipe(**wrong)
