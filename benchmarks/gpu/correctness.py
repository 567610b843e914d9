"""Checks of training: buffers, bits, counts, CUDA graphs."""

import hashlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.gpu import samples
from benchmarks.gpu.checks import ROOT, Answer, Check, Found
from benchmarks.gpu.loaders import settings_of, training_loader
from data.loading.crops import EvaluationCrop
from data.loading.loader import Loader
from data.loading.order import EvaluationPlan
from data.loading.storage import LocalShards
from data.shards.dataset import Dataset
from data.shards.parallel import available_cores

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


class Poisoned(deque[NDArray[np.uint8]]):
    """Buffers that are overwritten as soon as the loader gives them back."""

    def append(self, buffer: NDArray[np.uint8]) -> None:
        buffer.fill(0xFF)
        super().append(buffer)


def buffers(device: torch.device) -> Answer:
    """C4: checksums of every sample of two epochs, at leisure and under load with poisoned buffers."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = samples.make_dataset(Path(folder), 600, height=150, width=200)
        calm = _checksums(dataset, device, busy=False)
        loaded = {"default stream": _checksums(dataset, device, busy=True)}
        if device.type == "cuda":
            with torch.cuda.stream(torch.cuda.Stream(device)):
                loaded["another stream"] = _checksums(dataset, device, busy=True)
            loaded["CPU decodes"] = _checksums(dataset, device, busy=True, on_cpu=True)
            calm_cpu = _checksums(dataset, device, busy=False, on_cpu=True)
    different = {}
    for name, sums in loaded.items():
        expected = calm_cpu if name == "CPU decodes" else calm
        different[name] = sum(total != sums.get(sample) for sample, total in expected.items())
    return Answer(not any(different.values()), {"samples": len(calm), "different": different})


def _checksums(
    dataset: Dataset, device: torch.device, *, busy: bool, on_cpu: bool = False
) -> dict[tuple[int, int], int]:
    loader = training_loader(dataset, device, batch_size=32, on_cpu=on_cpu)
    if busy:
        loader._buffers = Poisoned()
    load = torch.randn(8192, 8192, device=device) if device.type == "cuda" else None
    sums: list[tuple[int, Tensor, Tensor]] = []
    for epoch in range(2):
        for batch in loader:
            if busy and load is not None:
                for _ in range(20):
                    torch.mm(load, load)
            elif load is not None:
                torch.cuda.synchronize()
            bits = batch.images.contiguous(memory_format=torch.channels_last).view(torch.int32)
            sums.append((epoch, batch.samples, bits.to(torch.int64).sum((1, 2, 3))))
    pairs = [(epoch, zip(names.tolist(), totals.tolist(), strict=True)) for epoch, names, totals in sums]
    return {(epoch, name): total for epoch, named in pairs for name, total in named}


def bits(device: torch.device) -> Answer:
    """C6: the weights after 40 steps, twice, and after 20 and a resume."""
    modes = {"default": False, "deterministic": True} if device.type == "cuda" else {"default": False}
    runs = list(itertools.product(modes, ("once", "again", "cut")))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max(1, available_cores() // 2)) as threads:
        _run(["pipeline.pack", "name=digits"], Path(folder))
        train = partial(_trained, Path(folder), device=device)
        digests = dict(zip(runs, threads.map(lambda run: train(*run, deterministic=modes[run[0]]), runs), strict=True))
    figures = Found()
    for mode in modes:
        once = digests[mode, "once"]
        figures[mode] = {"twice": once == digests[mode, "again"], "resumed": once == digests[mode, "cut"]}
    demanded = figures["deterministic" if device.type == "cuda" else "default"]
    return Answer(demanded == {"twice": True, "resumed": True}, figures)


def _trained(folder: Path, mode: str, name: str, *, device: torch.device, deterministic: bool) -> str:
    """Train two epochs of 20 steps, the run `cut` with a SIGKILL after the first; return a digest of the weights."""
    words = ["pipeline.train", "+model=resnet", "recipe.epochs=2", "+trainer.limit_train_batches=20", "tracking=none"]
    words += [f"trainer={'cpu' if device.type == 'cpu' else 'gpu'}", "log_every=20", "recipe.schedule.warmup_epochs=1"]
    words += [f"name={mode}-{name}", *(["+trainer.deterministic=true"] if deterministic else [])]
    last = folder / "runs" / f"{mode}-{name}" / "checkpoints" / "last.ckpt"
    if name == "cut":
        command = [sys.executable, "-m", *words]
        with subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            any("epoch 1/2  val" in line for line in process.stdout)
            while not last.is_file() and process.poll() is None:  # it follows the evaluation
                time.sleep(0.01)
            process.kill()
        assert not (last.parents[1] / "result.json").exists(), "it finished before it could be killed"
    _run(words, folder)
    state = torch.load(last, weights_only=True, map_location="cpu")["state_dict"]
    return hashlib.sha256(b"".join(one.numpy().tobytes() for one in state.values())).hexdigest()


def _run(words: list[str], folder: Path) -> None:
    command = [sys.executable, "-m", *words]
    answer = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise RuntimeError(answer.stderr.strip().rpartition("\n")[2])


def evaluation(device: torch.device) -> Answer:
    """C7: images and hits of an evaluation in bfloat16, against a count by hand."""
    import pytorch_lightning as pl

    from models.learning.classifier import Classifier
    from pipeline.build.network import build_recipe
    from pipeline.cli.compose import compose

    with tempfile.TemporaryDirectory() as folder:
        dataset = samples.make_dataset(Path(folder), 600, height=100, width=120)
        index, storage = dataset.index("train"), LocalShards(dataset.root)
        decode, crop = settings_of(dataset, device), EvaluationCrop(64)
        loader = Loader(index, storage, plan=EvaluationPlan(len(index), 64), crop=crop, decode=decode)
        torch.manual_seed(0)
        net = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 10))  # answers vary without training
        module = Classifier(net, num_classes=10, recipe=build_recipe(compose("train", ["+model=resnet"])))
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        accelerator = "gpu" if device.type == "cuda" else "cpu"
        trainer = pl.Trainer(accelerator=accelerator, devices=1, precision="bf16-mixed", **quiet)
        (metrics,) = trainer.validate(module, loader, verbose=False)
        module = module.to(device).eval()
        hits, ties, answers = torch.zeros(2, dtype=torch.int64), 0, torch.zeros(10, dtype=torch.int64)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            for images, labels, _ in loader:
                values, order = (one.cpu() for one in module(images.to(device)).float().topk(6))
                ties += int((values[:, 1:] == values[:, :-1]).any(1).sum())  # either class may come first
                right = order[:, :5] == labels[:, None]
                hits += torch.stack([right[:, 0].sum(), right.any(1).sum()])
                answers += order[:, 0].bincount(minlength=10)
    expected = (hits.double() / len(index)).tolist()
    found = [metrics["val/top1"], metrics["val/top5"]]
    figures = {"images": module.evaluated_images, "of": len(index), "found": found, "by hand": expected}
    figures |= {"ties": ties, "classes answered": int((answers > 0).sum())}
    close = all(abs(one - other) <= ties / len(index) + 1e-6 for one, other in zip(found, expected, strict=True))
    return Answer(module.evaluated_images == len(index) and close, figures)


def cuda_graph(device: torch.device) -> Answer:
    """C8: whether a CUDA graph is captured while DALI's batches are released."""
    with tempfile.TemporaryDirectory() as folder:
        loader = training_loader(samples.make_dataset(Path(folder), 400), device, batch_size=32)
        held = list(itertools.islice(loader, 4))
        layer, static = torch.nn.Linear(512, 512, device=device), torch.randn(64, 512, device=device)
        layer(static)
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured, capture_error_mode="thread_local"):
                outputs = layer(static)
                held.clear()
            captured.replay()
            torch.cuda.synchronize()
        except RuntimeError as error:
            return Answer(None, {"capture": str(error).splitlines()[0]})
        return Answer(None, {"capture": "survives", "finite": bool(outputs.isfinite().all())})


CHECKS = (
    Check("buffers", "no buffer is reused too early", 120, buffers),
    Check("bits", "training and resuming repeat their bits", 300, bits),
    Check("evaluation", "an evaluation counts every image once", 60, evaluation),
    Check("cuda graph", "a CUDA graph survives DALI", 60, cuda_graph, on_cpu=False),
)
