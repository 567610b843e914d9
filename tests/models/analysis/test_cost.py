"""Training memory against the growth of a process and the known state of optimizers."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn

from models.analysis.cost import kept_for_backward, separable_cost_ratio, state_per_weight, training_memory
from models.analysis.trace import TraceError
from tests.support.networks import build
from tests.support.paths import ROOT

# In a separate process whose allocator returns every larger block: memory after a forward is what the forward keeps.
GAIN = """
import gc, psutil, torch
from tests.support.networks import build
net = build({architecture!r}, {variant!r}, image_size={size}).train().to(memory_format=torch.channels_last)
images = torch.randn({batch}, 3, {size}, {size}).to(memory_format=torch.channels_last)
context = lambda: torch.autocast("cpu", dtype=torch.bfloat16, enabled={mixed})
with context():
    net(images).sum().backward()
gc.collect()
before = psutil.Process().memory_info().rss
with context():
    logits = net(images)
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.parametrize(
    ("architecture", "variant", "mixed"),
    [
        ("resnet", "resnet18", False),
        pytest.param("mobilenet", "mobilenet_v3_small", False, marks=pytest.mark.slow),
        ("mobilenet", "mobilenet_v3_small", True),
    ],
)
def test_activations_equal_the_growth_of_a_process(architecture: str, variant: str, mixed: bool) -> None:
    size, batch = 64, 8
    code = GAIN.format(architecture=architecture, variant=variant, size=size, batch=batch, mixed=mixed)
    variables = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "16384", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables, cwd=ROOT, check=True
    )
    net = build(architecture, variant, image_size=size)
    kept = kept_for_backward(net, (batch, 3, size, size), precision="bf16-mixed" if mixed else "32-true")
    assert kept > 30e6
    assert int(result.stdout) == pytest.approx(kept, rel=0.03)


def test_each_kept_tensor_counts_once() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1))
    # ReLU and the second convolution keep the same tensor; the images do not count.
    assert kept_for_backward(net, (2, 3, 8, 8), precision="32-true") == 2 * 4 * 8 * 8 * 4
    assert kept_for_backward(net, (2, 3, 8, 8), precision="64-true") == 2 * 4 * 8 * 8 * 8
    # Mixed precision: cast images, maps between the layers, and both cast kernels.
    kernels = 4 * 3 * 9 + 8 * 4 * 9
    assert kept_for_backward(net, (2, 3, 8, 8), precision="bf16-mixed") == 2 * (2 * 7 * 64 + kernels)


@pytest.mark.parametrize(
    ("optimizer", "numbers"),
    [
        (partial(torch.optim.SGD, lr=0.1), 0),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), 1),
        (partial(torch.optim.RMSprop, lr=0.1, momentum=0.9), 2),
        (partial(torch.optim.AdamW, lr=0.1), 2),
    ],
)
def test_optimizer_state_has_the_known_size(optimizer: partial, numbers: int) -> None:
    assert state_per_weight(optimizer) == numbers


def test_training_memory_is_the_sum_of_its_parts() -> None:
    net = build("resnet", "resnet18", image_size=64)
    net.stem.requires_grad_(False)
    memory = training_memory(net, (2, 3, 64, 64), precision="32-true", optimizer=partial(torch.optim.AdamW, lr=0.1))
    stem = 64 * 27 + 128
    weights = 11_689_512 - 64 * (147 - 27)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in net.buffers())
    assert memory.weights == 4 * weights + buffers
    assert memory.gradients == 4 * (weights - stem)
    assert memory.optimizer == 2 * memory.gradients
    assert memory.total == memory.weights + memory.gradients + memory.optimizer + memory.activations
    assert net.training
    assert all(parameter.grad is None for parameter in net.parameters())


def test_separable_cost_is_the_ratio_of_multiply_adds() -> None:
    for kernel, channels, filters in ((3, 32, 64), (5, 7, 11)):
        separable, standard = kernel**2 * channels + channels * filters, kernel**2 * channels * filters
        assert separable_cost_ratio((kernel, kernel), filters) * standard == separable


def test_a_network_that_needs_values_in_training_is_refused() -> None:
    class Random(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images * 2 if self.training and torch.rand(1).item() < 0.5 else images

    with pytest.raises(TraceError, match="Random does not run on shapes"):
        kept_for_backward(Random(), (1, 3, 8, 8), precision="32-true")


# Torch alone holds more than half of the limit before a network is built.
LARGEST = """
import re, torch
from functools import partial
from models.analysis.cost import training_memory
from models.analysis.summary import summarize
from tests.support.networks import build
with torch.device("meta"):
    net = build("coatnet", "coatnet_4")
summarize(net, (3, 224, 224))
training_memory(net, (32, 3, 224, 224), precision="32-true", optimizer=partial(torch.optim.AdamW, lr=0.1))
print(re.search(r"RssAnon:\\s*(\\d+)", open("/proc/self/status").read())[1])
"""


def test_the_largest_network_is_analysed_without_its_weights() -> None:
    result = subprocess.run([sys.executable, "-c", LARGEST], capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(result.stdout) * 1024 < 500e6  # weights and gradients alone would take 2.2e9


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="precision=8-bit is not one of 32-true, bf16-mixed, 16-mixed, "):
        kept_for_backward(nn.Conv2d(3, 4, 3), (1, 3, 8, 8), precision="8-bit")
