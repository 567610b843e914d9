"""Measurements of speed, with the aims that a GPU has to reach."""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import samples
from benchmarks.gpu.checks import Answer, Check
from benchmarks.gpu.loaders import training_loader
from data.loading.loader import Batch
from models.residual import resnet

AIM_OF_FIXED = 0.97  # of the rate with one batch that stays on the GPU
AIM_OF_TIMM = 1.3  # times the rate of timm's loop with as many cores
CORES = (4, 8, 16)
READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)  # by the host
LOADS = (0.0, 0.65, 0.9, 1.0)  # of the hardware decoder


class Rate(NamedTuple):
    """Images per second, and cores that were busy meanwhile."""

    images_per_second: float
    cores: float

    def __str__(self) -> str:
        return f"{self.images_per_second:,.0f}/s on {self.cores:.1f} cores"


def loader(device: torch.device) -> Answer:
    """S1: the loader alone."""
    figures: dict[str, object] = {}
    is_gpu = device.type == "cuda"
    batch_size, steps = (256, 20) if is_gpu else (64, 4)
    with tempfile.TemporaryDirectory() as folder:
        dataset = samples.make_dataset(Path(folder), 2000 if is_gpu else 300)
        places = (False, True) if is_gpu else (True,)
        for threads, prefetch, on_cpu in itertools.product(CORES if is_gpu else (1, 2), (2, 3), places):
            options = {"threads": threads, "prefetch": prefetch, "on_cpu": on_cpu}
            batches = _endless(training_loader(dataset, device, batch_size=batch_size, **options))
            rate = _rate(partial(next, batches), batch_size, steps=steps, device=device)
            figures[f"{'CPU' if on_cpu else 'GPU'}, {threads} threads, depth {prefetch}"] = str(rate)
        for load in LOADS if is_gpu else ():
            batches = _endless(training_loader(dataset, device, batch_size=batch_size, threads=8, load=load))
            rate = _rate(partial(next, batches), batch_size, steps=steps, device=device)
            figures[f"GPU, 8 threads, {load:.0%} by its hardware decoder"] = str(rate)
    return Answer(None, figures)


def training(device: torch.device) -> Answer:
    """S2: steps of a network with one fixed batch, and with the loader, in bfloat16."""
    is_gpu = device.type == "cuda"
    figures: dict[str, object] = {}
    shares, sizes = [], (64, 256) if is_gpu else (16,)  # the aim is for the last one
    with tempfile.TemporaryDirectory() as folder:
        dataset = samples.make_dataset(Path(folder), 2000 if is_gpu else 200)
        for size in sizes:
            step, steps = _make_step("resnet50" if is_gpu else "resnet18", device), 40 if is_gpu else 2
            fixed = next(iter(training_loader(dataset, device, batch_size=size)))
            reference = _rate(partial(step, fixed), size, steps=steps, device=device)
            figures[f"batch {size}, fixed"] = str(reference)
            decoding = [(8, False), *((cores, True) for cores in CORES)] if is_gpu else [(2, True)]
            for threads, on_cpu in decoding:
                options = {"threads": threads, "on_cpu": on_cpu}
                batches = _endless(training_loader(dataset, device, batch_size=size, **options))
                rate = _rate(partial(_next_step, step, batches), size, steps=steps, device=device)
                share = rate.images_per_second / reference.images_per_second
                shares += [share] if size == sizes[-1] else []
                name = f"batch {size}, {'CPU' if on_cpu else 'GPU'} decodes, {threads} threads"
                figures[name] = f"{rate}, {share:.3f} of fixed"
            batches = _endless(training_loader(dataset, device, batch_size=size, threads=8 if is_gpu else 2))
            rate = _rate(partial(_read_and_step, step, batches), size, steps=steps, device=device)
            figures[f"batch {size}, with a value read before each step"] = str(
                rate
            )  # as Lightning does on several ranks
    return Answer(max(shares) >= AIM_OF_FIXED if is_gpu else None, figures)


def compiled(device: torch.device) -> Answer:
    """S2: the same step compiled, with one fixed batch."""
    figures: dict[str, object] = {}
    is_gpu = device.type == "cuda"
    size, steps = (256, 40) if is_gpu else (8, 2)
    for mode in (None, "default", "max-autotune-no-cudagraphs") if is_gpu else (None, "default"):
        step = _make_step("resnet50" if is_gpu else "resnet18", device, compile_mode=mode)
        batch, start = _random_batch(size, device), time.perf_counter()
        step(batch)
        _wait(device)
        first = time.perf_counter() - start
        rate = _rate(partial(step, batch), size, steps=steps, device=device)
        figures[str(mode or "eager")] = f"{rate}, first step {first:.0f} s"
    return Answer(None, figures)


def beside_timm(device: torch.device) -> Answer:
    """S2: timm's loader with its prefetcher, in the same loop with 8 cores, where timm is installed."""
    if find_spec("timm") is None:
        return Answer(None, {"timm": "not installed"})
    from timm.data import create_dataset, create_loader

    with tempfile.TemporaryDirectory() as folder:
        dataset = samples.make_dataset(Path(folder), 2000)
        images = create_dataset("", str(Path(folder) / "images"), is_training=True)
        theirs = create_loader(images, (3, 224, 224), 256, is_training=True, num_workers=8, persistent_workers=True)
        step = _make_step("resnet50", device)
        ours = _endless(training_loader(dataset, device, batch_size=256, threads=8))
        others = _repeat(theirs)
        rates = []
        for _ in range(3):
            mine = _rate(partial(_next_step, step, ours), 256, steps=20, device=device)
            its = _rate(partial(_next_step, step, others), 256, steps=20, device=device)
            rates.append((mine.images_per_second / its.images_per_second, mine, its))
        ratio, mine, its = sorted(rates)[1]
    return Answer(ratio >= AIM_OF_TIMM, {"Convoy": str(mine), "timm": str(its), "ratio": round(ratio, 2)})


class Readings(TorchDispatchMode):
    """Counts the values that the host reads from tensors, each of which waits for the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        self.count += func in READS
        return func(*args, **(kwargs or {}))


def synchronisations(device: torch.device) -> Answer:
    """S3: waits of the host in 20 steps of training and of evaluation, after the loader's first batch."""
    from models.learning.classifier import Classifier
    from pipeline.build.network import build_recipe
    from pipeline.cli.compose import compose

    num_classes = 10 if device.type == "cuda" else 5  # on a CPU `one_hot`, for the top 5, reads values
    net = resnet("resnet18", num_classes=num_classes, image_size=32)
    module = Classifier(net, num_classes=num_classes, recipe=build_recipe(compose("train", ["+model=resnet"]))).to(
        device
    )
    images, labels, names = _random_batch(8, device, side=32)
    batch = (images, labels % num_classes, names)
    counts = {}
    for name, step in (("training", module.training_step), ("evaluation", module.validation_step)):
        with Readings() as readings:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            for number in range(20):
                step(batch, number)
            torch.cuda.set_sync_debug_mode("default") if device.type == "cuda" else None
        counts[name] = readings.count
    return Answer(not any(counts.values()), counts)


def footprint(device: torch.device) -> Answer:
    """S4: memory of the GPU in use beside torch's own, and the wait for batches, with AlexNet at batch 256."""
    from models.sequential import alexnet

    with tempfile.TemporaryDirectory() as folder:
        batches = _endless(training_loader(samples.make_dataset(Path(folder), 2000), device, batch_size=256))
        step = _make_step(alexnet("alexnet"), device)
        rate = _rate(partial(_next_step, step, batches), 256, steps=40, device=device)
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
    figures = {"rate": str(rate), "GiB in use": round((total - free) / 2**30, 1), "torch's": round(reserved / 2**30, 1)}
    with_power = getattr(torch.cuda, "power_draw", None)
    if with_power is not None and find_spec("pynvml") is not None:
        figures["watts"] = with_power(device) / 1000
    return Answer(None, figures)


def _make_step(
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


def _random_batch(count: int, device: torch.device, *, side: int = 224) -> Batch:
    images = torch.randn(count, 3, side, side, device=device).to(memory_format=torch.channels_last)
    return Batch(images, torch.randint(1000, (count,), device=device), torch.arange(count))


def _rate(step: Callable[[], object], batch_size: int, *, steps: int, device: torch.device) -> Rate:
    """The median of three rounds, after a warm-up."""
    for _ in range(max(2, steps // 4)):
        step()
    _wait(device)
    rounds = []
    for _ in range(3):
        start, cpu = time.perf_counter(), _cpu_seconds()
        for _ in range(steps):
            step()
        _wait(device)
        seconds = time.perf_counter() - start
        rounds.append(Rate(steps * batch_size / seconds, (_cpu_seconds() - cpu) / seconds))
    return statistics.median_low(rounds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_seconds() -> float:
    process = psutil.Process(os.getpid())
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def _endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        yield from batches


def _repeat(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
    while True:
        for images, labels in batches:
            yield Batch(images, labels, labels)


def _next_step(step: Callable[[Batch], Tensor], batches: Iterator[Batch]) -> Tensor:
    return step(next(batches))


def _read_and_step(step: Callable[[Batch], Tensor], batches: Iterator[Batch]) -> Tensor:
    torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu").item()
    return step(next(batches))


CHECKS = (
    Check("loader", "images per second of the loader alone", 240, loader),
    Check("training", f"the loader keeps {AIM_OF_FIXED} of a fixed batch's rate", 400, training),
    Check("compiled", "rate of a compiled step", 400, compiled),
    Check("timm", f"{AIM_OF_TIMM} times timm's rate with 8 cores", 300, beside_timm, on_cpu=False),
    Check("synchronisations", "no step waits for a value", 60, synchronisations),
    Check("footprint", "memory beside torch's", 120, footprint, on_cpu=False),
)
