"""The optimizers of other libraries do in a training what they do in a loop of their authors."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import pytorch_lightning as pl
import schedulefree
import timm.optim
import torch
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from models.layers import ConvNet, PooledLinear, conv_norm, relu
from models.learning.classifier import Classifier
from models.learning.recipe import computes_gradients
from pipeline.build.network import build_recipe
from pipeline.cli.compose import choices, compose

STEPS, CLIP = 5, 0.5
CONSTANT = (f"recipe.clip_norm={CLIP}", "schedule=constant", "recipe.warmup=0", "loss=cross_entropy")


def normed(num_classes: int) -> ConvNet:
    """Two convolutions with batch norms; the second is depthwise. Shapes: (N, 3, H, W) -> (N, num_classes)."""
    torch.manual_seed(0)
    stages = {"stage1": conv_norm(16, 16, kernel_size=3, groups=16, activation=relu)}
    stem = conv_norm(3, 16, kernel_size=3, activation=relu)
    return ConvNet(stem, stages, head=PooledLinear(16, num_classes))


def batches() -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8 * STEPS, 3, 8, 8, generator=generator)
    labels = torch.randint(7, (len(images),), generator=generator)
    return DataLoader(TensorDataset(images, labels, torch.arange(len(images))), 8)


def trained(module: Classifier) -> dict[str, Tensor]:
    """The weights of a network after some steps of Lightning."""
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    clip = module.recipe.clip_norm
    trainer = pl.Trainer(accelerator="cpu", max_steps=STEPS, max_epochs=-1, gradient_clip_val=clip, **quiet)
    trainer.fit(module, batches())
    return module.net.state_dict()


def classifier(*words: str) -> Classifier:
    recipe = build_recipe(compose("train", ["+model=resnet", *CONSTANT, *words]))
    return Classifier(normed(7), num_classes=7, recipe=recipe)


def looped(net: nn.Module, step: Callable[[Callable[[], Tensor]], None]) -> dict[str, Tensor]:
    """The weights of a network after a step a batch; a step is given the function that computes gradients."""
    for images, labels, _ in batches():

        def gradients(images: Tensor = images, labels: Tensor = labels) -> Tensor:
            net.zero_grad()
            loss = functional.cross_entropy(net(images), labels)
            loss.backward()
            dispatch_clip_grad(net.parameters(), CLIP, mode="norm")
            return loss

        step(gradients)
    return net.state_dict()


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], *, before: nn.Module, within: float) -> None:
    """Assert that two trainings have the same weights, each of which has changed."""
    assert found.keys() == expected.keys()
    initial = before.state_dict()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=within), name
        assert not torch.allclose(initial[name], tensor, rtol=0, atol=10 * within), name


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lamb", {}),
        ("muon", {"ns_coefficients": "original", "nesterov": True, "momentum": 0.95, "betas": (0.9, 0.999)}),
    ],
)
def test_an_optimizer_of_timm_trains_as_in_timms_loop(name: str, options: dict[str, object]) -> None:
    module = classifier(f"optimizer={name}", "recipe.optimizer.lr=0.01", "recipe.optimizer.weight_decay=0.1")
    before = copy.deepcopy(module.net)
    net = copy.deepcopy(module.net)
    optimizer = timm.optim.create_optimizer_v2(net, opt=name, lr=0.01, weight_decay=0.1, **{"momentum": 0.9, **options})

    def step(gradients: Callable[[], Tensor]) -> None:
        gradients()
        optimizer.step()

    assert_close(trained(module), looped(net, step), before=before, within=1e-6)


def test_schedule_free_adamw_has_the_weights_of_its_authors_evaluation() -> None:
    """Their other implementation has the averaged weights between `eval()` and `train()` only."""
    module = classifier("optimizer=schedule_free", "recipe.optimizer.lr=0.01", "recipe.optimizer.weight_decay=0")
    before = copy.deepcopy(module.net)
    net = copy.deepcopy(module.net)
    optimizer = schedulefree.AdamWScheduleFree(net.parameters(), lr=0.01)
    optimizer.train()

    def step(gradients: Callable[[], Tensor]) -> None:
        gradients()
        optimizer.step()

    looped(net, step)
    optimizer.eval()
    assert_close(trained(module), net.state_dict(), before=before, within=1e-4)  # it rounds the weights twice a step


def test_only_schedule_free_adamw_computes_its_gradients_itself() -> None:
    found = {}
    for name in choices("optimizer"):
        recipe = build_recipe(compose("train", ["+model=resnet", f"optimizer={name}"]))
        found[name] = computes_gradients(recipe.optimizer_factory()([nn.Parameter(torch.zeros(2, 2))]))
        constant = build_recipe(compose("train", ["+model=resnet", f"optimizer={name}", "schedule=constant"]))
        assert (recipe.falls_in_vain, constant.falls_in_vain) == (found[name], False)
    assert len(found) >= 9
    assert [name for name, value in found.items() if value] == ["schedule_free"]


def test_what_a_schedule_free_step_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^recipe.accumulate=2 does not go with an optimizer that needs all gradi"):
        classifier("optimizer=schedule_free", "recipe.accumulate=2")
    monkeypatch.setattr(pl.Trainer, "precision", "16-mixed")  # a CPU has none
    message = "^precision=16-mixed does not go with AdamWScheduleFreeClosure: use bf16-mixed or 32-true"
    with pytest.raises(ValueError, match=message):
        trained(classifier("optimizer=schedule_free"))
