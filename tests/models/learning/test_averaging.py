"""Averages of weights against timm, torch and NumPy."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from models.learning.averaging import AveragedWeights, Averaging, mean_of
from models.learning.classifier import Classifier
from tests.support.networks import make_recipe

NUM_STEPS = 40


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))


def averaged(net: nn.Module, averaging: Averaging) -> AveragedWeights:
    average = AveragedWeights(net, averaging)
    average.follow()
    return average


def take_step(net: nn.Module, step: int) -> None:
    """Take a step that moves every weight, and the statistics of the norm."""
    images = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(step))
    net.zero_grad()
    net(images).square().sum().backward()
    with torch.no_grad():
        for parameter in net.parameters():
            assert parameter.grad is not None
            parameter.sub_(0.05 * parameter.grad.sign())


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("warmup", "decay"), [(True, 0.9998), (True, 0.8), (False, 0.9)])
def test_the_average_equals_timms(warmup: bool, decay: float) -> None:
    net = make_net()
    average, theirs = averaged(net, Averaging(decay, warmup)), ModelEmaV3(net, decay=decay, use_warmup=warmup)
    for step in range(1, NUM_STEPS + 1):
        take_step(net, step)
        average.update(step)
        theirs.update(net, step=step)
    assert_near(average.tensors, theirs.module.state_dict())
    assert (average.tensors["3.weight"] - net[3].weight).abs().max() > 0.01
    assert average.tensors["0.1.num_batches_tracked"] == NUM_STEPS


@pytest.mark.parametrize("every", [1, 3])
def test_an_average_without_warmup_equals_torchs(every: int) -> None:
    net = make_net()
    average = averaged(net, Averaging(0.7, warmup=False, every=every))
    theirs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)
    for step in range(1, NUM_STEPS + 1):
        take_step(net, step)
        average.update(step)
        if step % every == 0:
            theirs.update_parameters(net)
    counter = "0.1.num_batches_tracked"  # torch averages counters too
    expected = {name: tensor for name, tensor in theirs.module.state_dict().items() if name != counter}
    assert_near({name: tensor for name, tensor in average.tensors.items() if name != counter}, expected)


def test_a_call_computes_with_the_averages_and_leaves_the_weights() -> None:
    net, images = make_net(), torch.randn(5, 3, 6, 6)
    average = averaged(net, Averaging())
    for step in range(1, 4):
        take_step(net, step)
        average.update(step)
    before, theirs = copy.deepcopy(net.state_dict()), copy.deepcopy(net)
    theirs.load_state_dict(average.tensors)
    for one in (net, theirs):
        one.eval()
    # Inside one autocast, which remembers casts of the network's own weights.
    for enabled in (False, True):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            raw, found = net(images), average(images)
            assert torch.equal(found, theirs(images))
            assert not torch.equal(found, raw)
            assert torch.equal(raw, net(images))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


class Remember(pl.Callback):
    """The averages at each evaluation, and the metrics of it."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        assert pl_module.average is not None
        self.tensors, self.weights = (copy.deepcopy(one) for one in (pl_module.average.tensors, pl_module.state_dict()))
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_an_evaluation_of_the_averages_is_one_of_a_network_with_them() -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(53, 3, 8, 8, generator=generator), torch.randint(7, (53,), generator=generator)
    batches, remember = DataLoader(TensorDataset(images, labels, torch.arange(53)), 8), Remember()
    module = Classifier(make_net(), num_classes=7, recipe=make_recipe())
    module.average = AveragedWeights(module.net, Averaging(0.9))
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=2, callbacks=[remember], num_sanity_val_steps=0, **quiet)
    trainer.fit(module, batches, batches)
    metrics = remember.metrics
    for prefix, state in (("val", remember.weights), ("val_ema", {f"net.{k}": v for k, v in remember.tensors.items()})):
        alone = Classifier(make_net(), num_classes=7, recipe=make_recipe())
        alone.load_state_dict(state)
        found = pl.Trainer(accelerator="cpu", **quiet).validate(alone, batches, verbose=False)[0]
        assert {"val/loss", "val/top1", "val/top5", "val/f1_macro", "val/balanced_accuracy"} == found.keys()
        for name, value in found.items():
            assert metrics[name.replace("val", prefix)] == value, name
    assert metrics["val/loss"] != metrics["val_ema/loss"]


def test_an_average_needs_ten_of_its_windows() -> None:
    warm, cold, rare = Averaging(), Averaging(0.99, warmup=False), Averaging(0.99, warmup=False, every=4)
    # N^(2/3) of N updates fit ten times from 10^3 on; without warm-up 1 / (1 - decay) of them do.
    for averaging, least in ((warm, 1000), (cold, 1000), (rare, 4000)):
        assert averaging.is_long_enough(least)
        assert not averaging.is_long_enough(least - 1)
        assert averaging.window(least) == pytest.approx(least / 10)
    assert warm.window(10**9) == pytest.approx(1 / (1 - 0.9998))
    assert Averaging(min_windows=0).is_long_enough(1)
    assert not Averaging(every=9, min_windows=0).is_long_enough(8), "it would never be updated"


@pytest.mark.parametrize(
    "values", [{"decay": 1.0}, {"decay": -0.1}, {"decay": math.nan}, {"every": 0}, {"min_windows": -1.0}]
)
def test_impossible_averages_are_refused(values: dict[str, float]) -> None:
    ((name, value),) = values.items()
    with pytest.raises(ValueError, match=f"^{name}={value} must be "):
        Averaging(**values)


def test_the_mean_of_state_dicts_equals_numpys() -> None:
    states = []
    for seed in range(5):
        net = make_net()
        for step in range(seed + 1):
            take_step(net, 10 * seed + step)
        states.append(copy.deepcopy(net.state_dict()))
    mean = mean_of(iter(states))
    assert mean.keys() == states[0].keys()
    for name, tensor in mean.items():
        assert tensor.dtype == states[0][name].dtype
        if tensor.is_floating_point():
            expected = np.mean([state[name].double().numpy() for state in states], axis=0).astype(np.float32)
            np.testing.assert_array_max_ulp(tensor.numpy(), expected, maxulp=1)
    assert mean["0.1.num_batches_tracked"] == 1
