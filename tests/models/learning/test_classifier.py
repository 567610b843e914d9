"""The Lightning module against counting by hand."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from models.learning.classifier import Classifier, fused_on
from models.learning.families import ResidualClassifier
from models.learning.losses import cross_entropy
from models.learning.metrics import UNSUMMED_STEPS, TrainingMetricAccumulator, TrainingMetrics
from models.learning.mixing import Mixing, mix_images
from models.residual import resnet
from pipeline.train.callbacks.seeding import SeedEachBatch
from tests.support.networks import make_recipe, plain


def make_loader(count: int, batch_size: int, num_classes: int = 7) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    labels = torch.randint(num_classes, (count,), generator=generator)
    return DataLoader(TensorDataset(images, labels, torch.arange(count)), batch_size)


def make_trainer(**options: object) -> pl.Trainer:
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    return pl.Trainer(accelerator="cpu", **dict.fromkeys(quiet, False), **options)


def frozen_classifier(**changes: object) -> Classifier:
    """A classifier whose weights stay."""
    torch.manual_seed(0)
    recipe = make_recipe(optimizer=partial(torch.optim.SGD, lr=0.0), **changes)
    return Classifier(plain(num_classes=7), num_classes=7, recipe=recipe)


class Take(pl.Callback):
    """Takes the training metrics after some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.taken = steps, []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: object) -> None:
        if trainer.global_step in self.steps:
            assert isinstance(pl_module, Classifier)
            self.taken.append(pl_module.training_metrics.take(pl_module))


def assert_means(metrics: TrainingMetrics, module: Classifier, batches: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Assert that metrics are the means over the images of some batches, with labels smoothed by 0.1."""
    images, labels, _ = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        logits = module(images)
    losses = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    hits = logits.topk(5).indices == labels[:, None]
    assert metrics.loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert metrics.top1 == pytest.approx(hits[:, 0].float().mean().item())
    assert metrics.top5 == pytest.approx(hits.any(1).float().mean().item())


def test_norms_and_biases_do_not_decay() -> None:
    module = ResidualClassifier(resnet("resnet18", num_classes=10), num_classes=10, recipe=make_recipe())
    make_trainer(max_steps=1).fit(module, make_loader(8, 4))
    decayed, free = module.optimizers().param_groups
    assert decayed["weight_decay"] == 1e-4
    assert free["weight_decay"] == 0
    # 20 convolutions and the linear layer; two tensors for each of 20 norms, and the linear layer's bias.
    assert (len(decayed["params"]), len(free["params"])) == (21, 41)
    assert {parameter.ndim for parameter in free["params"]} == {1}


@pytest.mark.parametrize("mix", [None, Mixing(mixup_alpha=1.0)], ids=["unmixed", "mixup"])
def test_evaluation_counts_as_a_loop_would(mix: Mixing | None) -> None:
    torch.manual_seed(0)
    module = Classifier(plain(num_classes=7), num_classes=7, recipe=make_recipe(mix=mix))
    batches = make_loader(53, 8)
    metrics = make_trainer().validate(module, batches, verbose=False)[0]
    images, labels, _ = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        logits = module.eval()(images)
    order = logits.argsort(descending=True)
    assert module.evaluated_images == 53
    assert metrics["val/loss"] == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert metrics["val/top1"] == pytest.approx((order[:, 0] == labels).float().mean().item())
    assert metrics["val/top5"] == pytest.approx((order[:, :5] == labels[:, None]).any(1).float().mean().item())
    assert metrics["val/f1_macro"] == pytest.approx(f1_score(labels, order[:, 0], average="macro"))
    assert metrics["val/balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, order[:, 0]))


@pytest.mark.parametrize("num_classes", [3, 10])
@pytest.mark.parametrize("mix", [None, Mixing(mixup_alpha=1.0), Mixing(cutmix_alpha=1.0)], ids=str)
def test_a_batch_is_trained_on_and_evaluated_without_reading_a_value(num_classes: int, mix: Mixing | None) -> None:
    module = Classifier(plain(num_classes=num_classes), num_classes=num_classes, recipe=make_recipe(mix=mix))
    module.batch_key = 0
    batch = next(iter(make_loader(8, 8, num_classes)))
    with FakeTensorMode(allow_non_fake_inputs=True) as without_values:
        batch = tuple(without_values.from_tensor(one) for one in batch)
        module.training_step(batch, 0)
        module.validation_step(batch, 0)
        with pytest.raises(DataDependentOutputException):
            batch[0].sum().item()


def test_a_loss_that_is_no_number_is_not_left_out_of_the_mean() -> None:
    module = Classifier(plain(num_classes=7), num_classes=7, recipe=make_recipe())
    loader = make_loader(16, 8)
    loader.dataset.tensors[0][12] = torch.nan
    assert math.isnan(make_trainer().validate(module, loader, verbose=False)[0]["val/loss"])


def test_training_metrics_are_means_since_the_last_call() -> None:
    module = frozen_classifier(loss=partial(cross_entropy, label_smoothing=0.1))
    loader, take = make_loader(24, 8), Take(2, 3)
    make_trainer(max_steps=3, callbacks=[take]).fit(module, loader)
    batches = list(loader)
    assert len(take.taken) == 2
    for metrics, part in zip(take.taken, (batches[:2], batches[2:]), strict=True):
        assert_means(metrics, module, part)


class Keys(pl.Callback):
    """Notes the keys of batches, and what each epoch gives to the loss as labels."""

    def __init__(self) -> None:
        self.keys, self.label_ranks = list[int](), dict[int, set[int]]()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: object) -> None:
        assert isinstance(pl_module, Classifier)
        self.keys.append(pl_module.batch_key)
        self.epoch = trainer.current_epoch

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.keys:  # not when the recipe is made
            self.label_ranks.setdefault(self.epoch, set()).add(labels.ndim)
        return cross_entropy(logits, labels)


@pytest.mark.parametrize("mix", [Mixing(mixup_alpha=1.0), Mixing(cutmix_alpha=1.0)], ids=str)
def test_training_metrics_of_mixed_images_weigh_both_labels(mix: Mixing) -> None:
    module = frozen_classifier(mix=mix)
    loader, take, keys = make_loader(24, 8), Take(3), Keys()
    make_trainer(max_steps=3, callbacks=[SeedEachBatch(0), keys, take]).fit(module, loader)
    losses, hits = [], []
    for (images, labels, _), key in zip(loader, keys.keys, strict=True):
        drawn = mix.draw(key, height=8, width=8)
        with torch.no_grad():
            logits = module(mix_images(images, drawn))
        for lam, its in ((drawn.lam, labels), (1 - drawn.lam, labels.roll(1))):
            losses.append(lam * functional.cross_entropy(logits, its, reduction="none"))
            hits.append(lam * (logits.topk(5).indices == its[:, None]))  # (N, 5)
    (metrics,) = take.taken
    top1, top5 = (torch.cat(hits)[:, :k].sum().item() / 24 for k in (1, 5))
    assert 0 < top1 < top5 < 1
    assert metrics == pytest.approx((torch.cat(losses).sum().item() / 24, top1, top5), rel=1e-5)


def test_batches_are_mixed_until_the_off_epoch() -> None:
    keys = Keys()
    module = frozen_classifier(mix=Mixing(mixup_alpha=1.0, off_epoch=-1), epochs=3, loss=keys.loss)
    make_trainer(max_epochs=3, callbacks=[SeedEachBatch(0), keys]).fit(module, make_loader(24, 8))
    assert len(set(keys.keys)) == 9
    assert keys.label_ranks == {0: {2}, 1: {2}, 2: {1}}


def test_training_metrics_continue_from_a_checkpoint() -> None:
    """Over more steps than are summed at once, with a checkpoint between them."""
    loader = make_loader(2 * (UNSUMMED_STEPS + 3), 2)
    batches, checkpoint = list(loader), {}
    first = frozen_classifier(loss=partial(cross_entropy, label_smoothing=0.1))
    make_trainer(max_steps=UNSUMMED_STEPS + 1).fit(first, loader)
    first.on_save_checkpoint(checkpoint)
    assert checkpoint["train_sums"][0] == 2 * (UNSUMMED_STEPS + 1)
    resumed = frozen_classifier(loss=partial(cross_entropy, label_smoothing=0.1))
    resumed.on_load_checkpoint(checkpoint)
    take = Take(2)
    make_trainer(max_steps=2, callbacks=[take]).fit(resumed, DataLoader(loader.dataset, 2))
    assert_means(take.taken[0], resumed, [*batches[: UNSUMMED_STEPS + 1], *batches[:2]])


@pytest.mark.parametrize("is_mixed", [False, True])
def test_training_metrics_do_not_depend_on_where_a_training_was_stopped(is_mixed: bool) -> None:
    """Nor on what each rank has counted: sums of losses between 1e-9 and 1e3, and of shares of labels."""
    generator = torch.Generator().manual_seed(0)
    losses = 10 ** (torch.rand(4096, generator=generator) * 12 - 9)
    logits, labels = torch.randn(4096, 7, generator=generator), torch.zeros(4096, dtype=torch.int64)
    if is_mixed:
        labels = (10 * torch.randn(4096, 7, generator=generator)).softmax(1)  # (N, K)
    module = SimpleNamespace(
        device="cpu", trainer=SimpleNamespace(strategy=SimpleNamespace(reduce=lambda sums, reduce_op: sums))
    )
    found = set()
    for batch_size, stops in ((16, ()), (16, (5, 130)), (16, range(200)), (4096, ()), (1, (7,))):
        accumulator = TrainingMetricAccumulator(5)
        for step, places in enumerate(torch.arange(4096).split(batch_size)):
            accumulator.add(losses[places], logits[places], labels=labels[places])
            if step in stops:
                sums = accumulator.global_sums(module)
                accumulator = TrainingMetricAccumulator(5)
                accumulator.restore(sums, rank=0)
        found.add(accumulator.take(module))
    assert len(found) == 1
    assert found.pop().loss == pytest.approx(losses.double().mean().item(), abs=2**-25)


def test_the_net_is_trained_in_channels_last_memory() -> None:
    module = Classifier(plain(num_classes=7), num_classes=7, recipe=make_recipe())
    kernels = [layer.weight for layer in module.net.modules() if isinstance(layer, nn.Conv2d)]
    assert len(kernels) == 3
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


def test_optimizers_are_fused_on_a_gpu_where_they_can_be() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    sgd, rmsprop = partial(torch.optim.SGD, lr=0.1), partial(torch.optim.RMSprop, lr=0.1)
    fused = fused_on(gpu, sgd)
    assert isinstance(fused, partial)
    assert fused.keywords == {"lr": 0.1, "fused": True}
    assert fused([{"params": [nn.Parameter(torch.zeros(2))]}]).defaults["fused"] is True
    chosen = partial(torch.optim.AdamW, foreach=True)
    for device, factory in ((cpu, sgd), (gpu, rmsprop), (gpu, chosen)):
        assert fused_on(device, factory) is factory


def test_a_fused_optimizer_is_refused_where_lightning_cannot_clip() -> None:
    fused = partial(torch.optim.AdamW, lr=0.1, fused=True)
    module = Classifier(plain(num_classes=7), num_classes=7, recipe=make_recipe(optimizer=fused, clip_norm=1.0))
    with pytest.raises(ValueError, match=r"^clip_norm=1.0 does not go with a fused optimizer in mixed precision$"):
        make_trainer(max_steps=1, precision="bf16-mixed", gradient_clip_val=1.0).fit(module, make_loader(8, 4))
