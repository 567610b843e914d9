"""How rates are measured: interleaved, bound to a number of cores, with the CPU time and the power that they take."""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional

from data.loading.loader import Batch
from models.residual import resnet

ROUNDS, SECONDS = 3, 1.0  # turns of each way, and how long they last


class Contender(NamedTuple):
    """A way to do the same work: a step, and the cores that it may use."""

    step: Callable[[], object]
    cores: int


class Rate(NamedTuple):
    """Images per second in each round; cores that were busy meanwhile, and watts of the GPU, None where unknown."""

    rounds: list[float]
    cores: float
    watts: float | None

    def __str__(self) -> str:
        power = "" if self.watts is None else f", {self.watts:.0f} W"
        rate = statistics.median(self.rounds)
        each = f"{1e6 * self.cores / rate:.0f} us an image"
        return f"{rate:,.{0 if rate >= 100 else 1}f}/s, {self.cores:.1f} cores busy ({each}){power}"

    def share_of(self, other: "Rate") -> float:
        """The median over the rounds of the ratio to another rate."""
        return statistics.median(mine / its for mine, its in zip(self.rounds, other.rounds, strict=True))

    def beside(self, other: "Rate") -> str:
        """The rate, and its share of another one."""
        return str(self) if self is other else f"{self}, {self.share_of(other):.3f} of fixed (median of rounds)"


def interleaved(
    ways: Mapping[str, Contender], batch_size: int, *, device: torch.device, ready: int = 4
) -> dict[str, Rate]:
    """Measure all ways in turn, so that a drift of the clocks meets all of them.

    Before each turn so many steps are not counted, for which a way has batches `ready` from the time that it waited.
    """
    for way in ways.values():
        with bound_to(way.cores):
            for _ in range(2):  # cuDNN chooses its algorithms
                way.step()
    rounds = [{name: _turn(way, ready, device=device) for name, way in ways.items()} for _ in range(ROUNDS)]
    rates = {}
    for name in ways:
        steps, seconds, cpu, watts = zip(*(one[name] for one in rounds), strict=True)
        known = [one for one in watts if one is not None]
        power = statistics.median(known) if known else None
        each = [number * batch_size / time for number, time in zip(steps, seconds, strict=True)]
        rates[name] = Rate(each, sum(cpu) / sum(seconds), power)
    return rates


def _turn(way: Contender, ready: int, *, device: torch.device) -> tuple[int, float, float, float | None]:
    """Steps, seconds, seconds of the CPU, and watts at the end."""
    with bound_to(way.cores):
        for _ in range(ready if device.type == "cuda" else 1):
            way.step()
        wait(device)
        start, cpu, steps = time.perf_counter(), _cpu_seconds(), 0
        while steps < 2 or time.perf_counter() - start < SECONDS:
            way.step()
            steps += 1
        watts = _watts(device)
        wait(device)
        return steps, time.perf_counter() - start, _cpu_seconds() - cpu, watts


@contextmanager
def bound_to(cores: int) -> Iterator[None]:
    """Keep this thread, and those that it starts meanwhile, to the first so many of its cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def make_step(
    network: str | nn.Module, device: torch.device, *, compile_mode: str | None = None
) -> Callable[[Batch], Tensor]:
    """A training step in bfloat16 with SGD, as `train` runs it: channels_last, a fused optimizer on a GPU."""
    torch.backends.cudnn.benchmark = True
    net = resnet(network) if isinstance(network, str) else network
    net = net.to(device, memory_format=torch.channels_last).train()
    if compile_mode is not None:
        net.compile(mode=compile_mode)
    fused = device.type == "cuda"
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=fused)

    def step(batch: Batch) -> Tensor:
        images, labels = batch.images.to(device), batch.labels.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = functional.cross_entropy(net(images), labels, label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def random_batch(count: int, device: torch.device, *, side: int = 224) -> Batch:
    """Noise with labels of 1,000 classes, on the device."""
    images = torch.randn(count, 3, side, side, device=device).to(memory_format=torch.channels_last)
    return Batch(images, torch.randint(1000, (count,), device=device), torch.arange(count))


def wait(device: torch.device) -> None:
    """Wait for all work on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _watts(device: torch.device) -> float | None:
    if device.type != "cuda" or find_spec("pynvml") is None:
        return None
    return torch.cuda.power_draw(device) / 1000


def _cpu_seconds() -> float:
    process = psutil.Process(os.getpid())
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)
