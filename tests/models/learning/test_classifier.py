"""The Lightning module against formulas written out, and against counting by hand."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import get_class
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from models.learning.classifier import (
    AttentionClassifier,
    Classifier,
    ResidualClassifier,
    SeparableClassifier,
    SequentialClassifier,
)
from models.learning.recipe import Recipe, warmup_cosine, warmup_exponential, warmup_milestones
from models.residual import resnet
from pipeline.cli.config import CONF, compose
from tests.support.networks import build, plain

MODELS, RECIPES = (sorted((CONF / group).glob("*.yaml")) for group in ("model", "recipe"))


def recipe(**changes: object) -> Recipe:
    def optimizer(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)

    return Recipe(**{"epochs": 2, "optimizer": optimizer, "schedule": warmup_cosine, **changes})


def loader(count: int, batch_size: int, num_classes: int = 7) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    labels = torch.randint(num_classes, (count,), generator=generator)
    return DataLoader(TensorDataset(images, labels, torch.arange(count)), batch_size)


def trainer(**options: object) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(accelerator="cpu", **quiet, **options)


def test_the_schedule_rises_and_falls() -> None:
    factors = [
        warmup_cosine(step, steps_per_epoch=10, num_steps=60, warmup_epochs=2, final_fraction=0.1) for step in range(61)
    ]
    assert factors[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert factors[40] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert factors[60] == pytest.approx(0.1)
    assert all(before >= after for before, after in itertools.pairwise(factors[20:]))


def test_the_exponential_schedule_is_the_papers() -> None:
    """0.97 every 2.4 epochs (Tan & Le 2019), on a whole training of 350 epochs with 10 steps each."""
    for epoch in (5, 53, 197, 350):
        factor = warmup_exponential(
            epoch * 10, steps_per_epoch=10, num_steps=3500, warmup_epochs=0, final_fraction=0.97 ** (350 / 2.4)
        )
        assert factor == pytest.approx(0.97 ** (epoch / 2.4))
    rising = [warmup_exponential(step, steps_per_epoch=10, num_steps=100, warmup_epochs=2) for step in range(20)]
    assert rising == pytest.approx([(step + 1) / 20 for step in range(20)])


def test_the_milestones_are_torchvisions() -> None:
    """`StepLR(step_size=30, gamma=0.1)` over 90 epochs of 7 steps, which torchvision steps once an epoch."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.1)
    third, two_thirds = compose("train", ["+model=vgg"]).recipe.schedule.milestones
    for epoch in range(90):
        for step in range(7 * epoch, 7 * epoch + 7):
            factor = warmup_milestones(step, steps_per_epoch=7, num_steps=630, milestones=(third, two_thirds))
            assert factor == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def groups_of(module: Classifier) -> dict[bool, set[str]]:
    """Names of the parameters with and without weight decay."""
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for name, parameter in module.net.named_parameters():
        found[module.decays(f"net.{name}", parameter)].add(name)
    return found


def test_families_decay_what_their_papers_say() -> None:
    families: list[tuple[type[Classifier], str, str, int, str]] = [
        (SequentialClassifier, "vgg", "vgg11_bn", 11, r"(bias|\.1\.weight|\.4\.weight)$"),
        # 16 expanding and 17 projecting kernels, the stem, the last 1x1, the linear layer; no depthwise one.
        (SeparableClassifier, "mobilenet", "mobilenet_v2", 36, r"(bias|\.1\.weight|depthwise\.0\.weight)$"),
        (AttentionClassifier, "convnext", "convnext_tiny", 59, r"(bias|norm\.weight|layer_scale|\.[01]\.weight)$"),
        (AttentionClassifier, "coatnet", "coatnet_0", 61, r"(bias|norm\d?\.weight|table|\.1\.weight)$"),
    ]
    for family, architecture, variant, num_decayed, free in families:
        net = build(architecture, variant, num_classes=10, image_size=32)
        groups = groups_of(family(net, num_classes=10, recipe=recipe()))
        parameters = dict(net.named_parameters())
        assert all(parameters[name].ndim > 1 for name in groups[True])
        assert all(re.search(free, name) for name in groups[False])
        assert not [name for name in groups[True] if "depthwise" in name and family is SeparableClassifier]
        assert len(groups[True]) == num_decayed, architecture


def test_families_begin_as_their_papers_say() -> None:
    torch.manual_seed(0)
    vgg = build("vgg", "vgg16", num_classes=10, image_size=32)
    SequentialClassifier(vgg, num_classes=10, recipe=recipe())
    assert vgg.stages.stage4[2].weight.std().item() == pytest.approx(math.sqrt(2 / (512 * 9)), rel=0.01)
    assert vgg.head.linear3.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert vgg.stages.stage4[2].bias.abs().max() == 0
    mobile = build("mobilenet", "mobilenet_v2", num_classes=1000, image_size=32)
    SeparableClassifier(mobile, num_classes=1000, recipe=recipe())
    block = mobile.stages.stage5[-1]
    assert block.depthwise[0].weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.02)
    assert block.expand[0].weight.std().item() == pytest.approx(math.sqrt(2 / 960), rel=0.01)
    assert mobile.head[1].linear.weight.abs().max().item() == pytest.approx(1 / math.sqrt(1000), rel=0.01)
    for architecture, variant in (("convnext", "convnext_tiny"), ("coatnet", "coatnet_0")):
        net = build(architecture, variant, num_classes=10, image_size=32)
        AttentionClassifier(net, num_classes=10, recipe=recipe())
        kernels = [layer.weight for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        assert torch.cat([kernel.flatten() for kernel in kernels]).std().item() == pytest.approx(0.02, rel=0.01)
    table = net.stages.stage3[0].attention.bias.table
    assert table.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_deep_plain_network_keeps_its_signal() -> None:
    """The reason for He et al. 2015: from Krizhevsky's 0.01 nothing is left behind VGG-19's convolutions."""
    torch.manual_seed(0)
    net = build("vgg", "vgg19", num_classes=10, image_size=32)
    SequentialClassifier(net, num_classes=10, recipe=recipe())
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        drawn = net.stages(images).std().item()
        for layer in net.stages.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
        narrow = net.stages(images).std().item()
    assert 0.1 < drawn < 10
    assert narrow < 1e-6


def test_every_config_brings_the_recipe_of_its_family() -> None:
    recipes = {choice.stem: compose("train", ["+model=resnet", f"recipe={choice.stem}"]).recipe for choice in RECIPES}
    assert len(recipes) == 5
    refined = {"coatnet": "adamw_coatnet"}
    for path in MODELS:
        config = compose("train", [f"+model={path.stem}"])
        family = get_class(config.classifier._target_)
        assert config.recipe == recipes[refined.get(path.stem, family.default_recipe)], path.stem
        changed = compose("train", [f"+model={path.stem}", "recipe=sgd", "recipe.optimizer.lr=0.5"])
        assert (changed.recipe.optimizer._target_, changed.recipe.optimizer.lr) == ("torch.optim.SGD", 0.5)
        assert changed.recipe.clip_norm is None


def test_norms_and_biases_do_not_decay() -> None:
    module = ResidualClassifier(resnet("resnet18", num_classes=10), num_classes=10, recipe=recipe())
    trainer(max_steps=1).fit(module, loader(8, 4))
    decayed, free = module.optimizers().param_groups
    assert decayed["weight_decay"] == 1e-4
    assert free["weight_decay"] == 0
    # 20 convolutions and the linear layer; two tensors for each of 20 norms, and the linear layer's bias.
    assert (len(decayed["params"]), len(free["params"])) == (21, 41)
    assert {parameter.ndim for parameter in free["params"]} == {1}


def test_residual_blocks_begin_as_the_identity() -> None:
    torch.manual_seed(0)
    net = resnet("resnet50", num_classes=10)
    ResidualClassifier(net, num_classes=10, recipe=recipe())
    features = torch.rand(2, 256, 4, 4)
    block = net.stages.stage1[1].eval()
    assert torch.equal(block(features), features)
    kernel = net.stages.stage4[0].conv2[0].weight
    assert kernel.std().item() == pytest.approx(math.sqrt(2 / (512 * 9)), rel=0.01)


def test_evaluation_counts_as_a_loop_would() -> None:
    torch.manual_seed(0)
    module = Classifier(plain(num_classes=7), num_classes=7, recipe=recipe())
    batches = loader(53, 8)
    metrics = trainer().validate(module, batches, verbose=False)[0]
    images, labels, _ = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        logits = module.eval()(images)
    order = logits.argsort(descending=True)
    assert module.evaluated_images == 53
    assert metrics["val/loss"] == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert metrics["val/top1"] == pytest.approx((order[:, 0] == labels).float().mean().item())
    assert metrics["val/top5"] == pytest.approx((order[:, :5] == labels[:, None]).any(1).float().mean().item())


def test_training_metrics_are_means_since_the_last_take() -> None:
    taken = []

    class Take(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: object) -> None:
            if trainer.global_step in (2, 3):
                assert isinstance(pl_module, Classifier)
                taken.append(pl_module.take_training_metrics())

    def frozen(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=0.0)

    torch.manual_seed(0)
    module = Classifier(plain(num_classes=7), num_classes=7, recipe=recipe(optimizer=frozen, label_smoothing=0.1))
    batches = loader(24, 8)
    trainer(max_steps=3, callbacks=[Take()]).fit(module, batches)
    images, labels, _ = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        logits = module(images)
    losses = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    hits = logits.topk(5).indices == labels[:, None]
    assert len(taken) == 2
    for metrics, part in zip(taken, (slice(0, 16), slice(16, 24)), strict=True):
        assert metrics.loss == pytest.approx(losses[part].mean().item(), rel=1e-5)
        assert metrics.top1 == pytest.approx(hits[part, 0].float().mean().item())
        assert metrics.top5 == pytest.approx(hits[part].any(1).float().mean().item())


def test_the_net_is_trained_in_channels_last_memory() -> None:
    module = Classifier(plain(num_classes=7), num_classes=7, recipe=recipe())
    kernels = [layer.weight for layer in module.net.modules() if isinstance(layer, nn.Conv2d)]
    assert len(kernels) == 3
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"label_smoothing": 1.0}, {"clip_norm": 0.0}])
def test_a_recipe_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        recipe(**wrong)
