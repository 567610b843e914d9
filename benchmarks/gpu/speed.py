"""Measurements of speed, with the aims that a GPU has to reach."""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.gpu import samples
from benchmarks.gpu.checks import Answer, Check, PrintedFigures
from benchmarks.gpu.loaders import training_loader
from benchmarks.gpu.rates import Contender, Rate, bound_to, interleaved, make_step, random_batch, wait
from data.loading.loader import Batch, TrainingLoader
from data.shards.dataset import Dataset

Step = Callable[[Batch], Tensor]
AIM_OF_FIXED = 0.97  # of the rate with one batch that stays on the GPU
AIM_OF_TIMM = 1.3  # times the rate of timm's loader with as many cores, in the same loop
CORES = (4, 8, 16)
LOADS = (0.0, 0.65, 1.0)  # of the hardware decoder


def measure_loader(device: torch.device) -> Answer:
    """S1: the loader alone, one after the other: the threads of two would share cores."""
    is_gpu = device.type == "cuda"
    size = 256 if is_gpu else 64
    figures = PrintedFigures()
    with tempfile.TemporaryDirectory() as folder:
        dataset = samples.make_dataset(Path(folder), 2000 if is_gpu else 300)
        options: list[dict[str, Any]] = [
            {"threads": threads, "on_cpu": True} for threads in (CORES if is_gpu else (1, 2))
        ]
        if is_gpu:
            options += [{"threads": threads, "on_cpu": False} for threads in CORES]
            options += [{"threads": 8, "on_cpu": False, "change": {"hardware_load": load}} for load in LOADS]
            options += [{"threads": 8, "on_cpu": False, "change": {"fancy_upsampling": False}}]
        options += [{"threads": options[-1]["threads"], "on_cpu": not is_gpu, "prefetch": 3}]
        for chosen in options:
            with bound_to(chosen["threads"]):
                source = training_loader(dataset, device, batch_size=size, **chosen)
                callback = TimedCallback(source)
                contender = Contender(partial(next, _endless(source)), chosen["threads"])
                rate = interleaved({"alone": contender}, size, device=device)["alone"]
                figures[_name(**chosen)] = f"{rate}, {callback.microseconds(size):.1f} us an image in the callback"
    return Answer(None, figures)


class TimedCallback:
    """The time of the callback in which a loader hands batches to DALI."""

    def __init__(self, loader: TrainingLoader) -> None:
        self._encoded, self._times = loader._encoded, []
        loader._encoded = self

    def __call__(self) -> tuple[Any, ...]:
        start = time.thread_time()
        inputs = self._encoded()
        self._times.append(time.thread_time() - start)
        return inputs

    def microseconds(self, batch_size: int) -> float:
        """The median of its time of the CPU, for an image."""
        return 1e6 * statistics.median(self._times) / batch_size


def measure_training(device: torch.device) -> Answer:
    """S2: steps of a network in bfloat16 with one fixed batch and with the loader, by turns."""
    is_gpu = device.type == "cuda"
    figures, shares = PrintedFigures(), {}
    with tempfile.TemporaryDirectory() as folder:
        dataset = samples.make_dataset(Path(folder), 2000 if is_gpu else 200)
        for size in (256, 64) if is_gpu else (16,):
            step = make_step("resnet50" if is_gpu else "resnet18", device)
            fixed = next(iter(training_loader(dataset, device, batch_size=size)))
            ways = {"fixed": Contender(partial(step, fixed), max(CORES))}
            decoding = [(8, False), *((cores, True) for cores in CORES)] if is_gpu else [(2, True)]
            for threads, on_cpu in decoding:
                batches = _batches(dataset, device, size=size, threads=threads, on_cpu=on_cpu)
                ways[_name(threads=threads, on_cpu=on_cpu)] = Contender(partial(_next_step, step, batches), threads)
            batches = _batches(dataset, device, size=size, threads=8, on_cpu=not is_gpu)
            # as Lightning does on several ranks
            ways["a value read before each step"] = Contender(partial(_read_and_step, step, batches, device), 8)
            rates = interleaved(ways, size, device=device)
            for name, rate in rates.items():
                figures[f"batch {size}, {name}"] = rate.beside(rates["fixed"])
                if "decodes" in name and size == 256:
                    shares[name] = rate.share_of(rates["fixed"])
    return Answer(max(shares.values()) >= AIM_OF_FIXED if is_gpu else None, figures)


def measure_compiled(device: torch.device) -> Answer:
    """S2: the same step compiled, with one fixed batch and with the loader."""
    is_gpu = device.type == "cuda"
    size, network = (256, "resnet50") if is_gpu else (8, "resnet18")
    figures = PrintedFigures()
    with tempfile.TemporaryDirectory() as folder:
        dataset = samples.make_dataset(Path(folder), 1000 if is_gpu else 100)
        batch, ways = random_batch(size, device), {}
        for name, mode in (("eager", None), ("compiled", "default")):
            step, start = make_step(network, device, compile_mode=mode), time.perf_counter()
            step(batch)
            wait(device)
            figures[f"{name}, first step"] = f"{time.perf_counter() - start:.0f} s"
            batches = _batches(dataset, device, size=size, threads=8 if is_gpu else 2, on_cpu=not is_gpu)
            ways[f"{name}, fixed"] = Contender(partial(step, batch), 8)
            ways[f"{name}, with the loader"] = Contender(partial(_next_step, step, batches), 8)
        rates = interleaved(ways, size, device=device)
    for name, rate in rates.items():
        figures[name] = rate.beside(rates[f"{name.partition(',')[0]}, fixed"])
    return Answer(None, figures)


def compare_with_timm(device: torch.device) -> Answer:
    """S2: timm's loader with its prefetcher, in the same loop with 8 cores, where timm is installed."""
    if find_spec("timm") is None:
        return Answer(None, {"timm": "not installed"})
    with tempfile.TemporaryDirectory() as folder:
        dataset, step = samples.make_dataset(Path(folder), 2000), make_step("resnet50", device)
        # One after the other: while one waited, its workers would take the other's cores.
        theirs = _rate_of_timm(Path(folder) / "images", step, device)
        batches = _batches(dataset, device, size=256, threads=8, on_cpu=False)
        ours = interleaved({"alone": Contender(partial(_next_step, step, batches), 8)}, 256, device=device)["alone"]
    ratio = ours.share_of(theirs)
    return Answer(ratio >= AIM_OF_TIMM, {"Convoy": str(ours), "timm": str(theirs), "ratio": round(ratio, 2)})


def _rate_of_timm(folder: Path, step: Step, device: torch.device) -> Rate:
    from timm.data import create_dataset, create_loader

    images = create_dataset("", str(folder), is_training=True)
    with bound_to(8):
        loader = create_loader(images, (3, 224, 224), 256, is_training=True, num_workers=8, persistent_workers=True)
        batches = _repeat(loader)
        next(batches)  # starts its workers
    contender = Contender(partial(_next_step, step, batches), 8)
    rate = interleaved({"alone": contender}, 256, device=device, ready=2 * 8)["alone"]  # each has two batches ready
    del contender, batches, loader
    gc.collect()
    psutil.wait_procs(psutil.Process().children(), timeout=20)
    return rate


def measure_footprint(device: torch.device) -> Answer:
    """S4: memory of the GPU in use beside torch's own, and the wait for batches, with AlexNet at batch 256."""
    from models.sequential import alexnet

    lowest = torch.cuda.mem_get_info(device)[0]
    with tempfile.TemporaryDirectory() as folder:
        source = training_loader(samples.make_dataset(Path(folder), 2000), device, batch_size=256, threads=8)
        step, batches = make_step(alexnet("alexnet"), device), _endless(source)

        def step_and_look() -> None:
            nonlocal lowest
            _next_step(step, batches)
            lowest = min(lowest, torch.cuda.mem_get_info(device)[0])

        start, waited = time.perf_counter(), source.wait_seconds
        rate = interleaved({"rate": Contender(step_and_look, 16)}, 256, device=device)["rate"]
        share = (source.wait_seconds - waited) / (time.perf_counter() - start)
        busy = torch.cuda.utilization(device) if find_spec("pynvml") is not None else None
        total = torch.cuda.mem_get_info(device)[1]
        reserved = torch.cuda.max_memory_reserved(device)
    peaks = {"GiB in use at most": round((total - lowest) / 2**30, 1), "torch's": round(reserved / 2**30, 1)}
    waits = {"share of time that waits for batches": round(share, 2), "percent that the GPU is busy": busy}
    return Answer(None, {"rate": str(rate), **peaks, **waits})


def _name(*, threads: int, on_cpu: bool, prefetch: int = 2, change: Mapping[str, Any] | None = None) -> str:
    depth = "" if prefetch == 2 else f", depth {prefetch}"
    extra = "".join(f", {name} {value}" for name, value in (change or {}).items())
    return f"{'CPU' if on_cpu else 'GPU'} decodes, {threads} cores{depth}{extra}"


def _batches(dataset: Dataset, device: torch.device, *, size: int, threads: int, on_cpu: bool) -> Iterator[Batch]:
    """Batches without end, from threads that are bound to as many cores."""
    with bound_to(threads):
        batches = _endless(training_loader(dataset, device, batch_size=size, threads=threads, on_cpu=on_cpu))
        next(batches)  # starts the threads
    return batches


def _endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        yield from batches


def _repeat(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
    while True:
        for images, labels in batches:
            yield Batch(images, labels, labels)


def _next_step(step: Step, batches: Iterator[Batch]) -> Tensor:
    return step(next(batches))


def _read_and_step(step: Step, batches: Iterator[Batch], device: torch.device) -> Tensor:
    torch.zeros(1, device=device).item()
    return _next_step(step, batches)


CHECKS = (
    Check("loader", "images per second of the loader alone", 180, measure_loader, alone=True),
    Check("training", f"the loader keeps {AIM_OF_FIXED} of a fixed batch's rate", 240, measure_training, alone=True),
    Check("compiled", "rate of a compiled step", 240, measure_compiled, alone=True),
    Check("timm", f"{AIM_OF_TIMM} times timm's rate with 8 cores", 180, compare_with_timm, on_cpu=False, alone=True),
    Check("footprint", "memory beside torch's", 90, measure_footprint, on_cpu=False, alone=True),
)
