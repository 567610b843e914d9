"""The Lightning module against formulas written out, and against counting by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from models.classifier import Classifier, Recipe, ResidualClassifier, warmup_cosine
from models.residual import resnet
from tests.networks import plain


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
