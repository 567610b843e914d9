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
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali.tensors import TensorListGPU
from torch import Tensor, nn

from benchmarks.gpu import samples
from benchmarks.gpu.checks import ROOT, Answer, Check, PrintedFigures
from benchmarks.gpu.loaders import find_decoder, make_settings, training_loader
from data.augment.augmentation import Augmentation
from data.augment.crops import EvaluationCrop
from data.loading import loader as loader_module
from data.loading.graph import as_torch
from data.loading.loader import Batch, Loader
from data.loading.order import EvaluationPlan
from data.shards.dataset import Dataset
from data.shards.parallel import available_cores
from data.storage.local import LocalShards

HELD = 3  # batches before the first is summed


class Poisoned(deque[NDArray[np.uint8]]):
    """Buffers that are overwritten as soon as the loader gives them back."""

    def append(self, buffer: NDArray[np.uint8]) -> None:
        buffer.fill(0xFF)
        super().append(buffer)


def check_buffers(device: torch.device) -> Answer:
    """C4: checksums of every sample of two epochs, unloaded and under load with poisoned buffers."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = samples.make_dataset(Path(folder), 600, height=150, width=200)
        places = {"GPU": False, "CPU": True} if device.type == "cuda" else {"CPU": True}
        num_samples, different = 0, PrintedFigures()
        for place, on_cpu in places.items():
            sums = partial(_checksums, dataset, device, on_cpu=on_cpu)
            unloaded = sums(busy=False)
            num_samples = len(unloaded)
            loaded = {"default stream": sums(busy=True)}
            if device.type == "cuda":
                with torch.cuda.stream(torch.cuda.Stream(device)):
                    loaded["another stream"] = sums(busy=True)
                with mock.patch.object(loader_module, "as_torch", _as_torch_with_a_wait):
                    loaded["torch waits for DALI's stream"] = sums(busy=True)
            for name, found in loaded.items():
                changed = sum(total != found.get(sample) for sample, total in unloaded.items())
                different[f"{place} decodes, {name}"] = f"{changed} of {num_samples} differ"
    return Answer(num_samples == 1024 and all(one.startswith("0 ") for one in different.values()), different)


def _as_torch_with_a_wait(output: TensorListGPU) -> Tensor:
    return torch.utils.dlpack.from_dlpack(output.as_tensor())


def _checksums(dataset: Dataset, device: torch.device, *, busy: bool, on_cpu: bool) -> dict[tuple[int, int], int]:
    loader = training_loader(dataset, device, batch_size=32, on_cpu=on_cpu)
    if busy:
        loader._buffers = Poisoned()
    load = torch.randn(4096, 4096, device=device) if device.type == "cuda" else None
    product = None if load is None else torch.empty_like(load)
    sums: list[tuple[int, Tensor, Tensor]] = []
    held: deque[tuple[int, Batch]] = deque()  # memory that is reused too early changes them
    for epoch in range(2):
        for batch in loader:
            held.append((epoch, batch))
            if busy and load is not None:
                for _ in range(20):
                    torch.mm(load, load, out=product)
            elif load is not None:
                torch.cuda.synchronize()
            del batch
            if len(held) > (HELD if busy else 0):  # the reference is summed at once
                sums.append(_checksum(*held.popleft()))
    sums += [_checksum(*one) for one in held]
    pairs = [(epoch, zip(names.tolist(), totals.tolist(), strict=True)) for epoch, names, totals in sums]
    return {(epoch, name): total for epoch, named in pairs for name, total in named}


def _checksum(epoch: int, batch: Batch) -> tuple[int, Tensor, Tensor]:
    """The sum of the bits of each image, weighted by their place."""
    bits = batch.images.contiguous(memory_format=torch.channels_last).view(torch.int32).to(torch.int64).flatten(1)
    places = torch.arange(1, bits.shape[1] + 1, device=bits.device)
    return epoch, batch.samples, (bits * places).sum(1)


def check_bits(device: torch.device) -> Answer:
    """C6: the weights after 40 steps, twice, and after 20 and a resume."""
    modes = {"default": False, "deterministic": True} if device.type == "cuda" else {"default": False}
    runs = list(itertools.product(modes, ("once", "again", "cut")))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max(1, available_cores() // 2)) as threads:
        samples.make_dataset(Path(folder), 800, height=60, width=80)
        train = partial(_trained, Path(folder), device=device)
        digests = dict(zip(runs, threads.map(lambda run: train(*run, deterministic=modes[run[0]]), runs), strict=True))
    figures, holds = PrintedFigures(), True
    for mode in modes:
        other = {"again": "started again", "cut": "killed and resumed"}
        differ = [words for name, words in other.items() if digests[mode, name] != digests[mode, "once"]]
        figures[mode] = f"other bits when {' and '.join(differ)}" if differ else "the same bits three times"
        if mode == "deterministic" or device.type == "cpu":
            holds &= not differ
    return Answer(holds, figures)


def _trained(folder: Path, mode: str, name: str, *, device: torch.device, deterministic: bool) -> str:
    """Train two epochs of 20 steps, the run `cut` with a SIGKILL after the first; return a digest of the weights."""
    words = ["pipeline.train", "+model=resnet", "recipe.epochs=2", "+trainer.limit_train_batches=20", "tracking=none"]
    words += [f"trainer={'cpu' if device.type == 'cpu' else 'gpu'}", "log_every=20", "recipe.warmup_epochs=1"]
    words += ["data=shards", "data.root=packed", "data.image_size=32", "data.batch_size=32"]
    words += [f"name={mode}-{name}", *(["+trainer.deterministic=true"] if deterministic else [])]
    last = folder / "runs" / f"{mode}-{name}" / "checkpoints" / "last.ckpt"
    if name == "cut":
        command = [sys.executable, "-m", *words]
        with subprocess.Popen(command, cwd=folder, env=_environment(), stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if "epoch 1/2  val" in line:
                    break
            while not last.is_file() and process.poll() is None:  # it follows the evaluation
                time.sleep(0.01)
            process.kill()
        assert not (last.parents[1] / "result.json").exists(), "it finished before it could be killed"
    printed = _run(words, folder)
    if name == "cut" and ("epoch 1/2" in printed or "epoch 2/2" not in printed):
        raise RuntimeError("the killed run started over instead of resuming")
    state = torch.load(last, weights_only=True, map_location="cpu")["state_dict"]
    return hashlib.sha256(b"".join(one.numpy().tobytes() for one in state.values())).hexdigest()


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def _run(words: list[str], folder: Path) -> str:
    command = [sys.executable, "-m", *words]
    answer = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise RuntimeError(answer.stderr.strip().rpartition("\n")[2])
    return answer.stdout


def check_evaluation(device: torch.device) -> Answer:
    """C7: images and hits of an evaluation in bfloat16, against a count by hand."""
    import pytorch_lightning as pl

    from models.learning.classifier import Classifier
    from pipeline.build.network import build_recipe
    from pipeline.cli.compose import compose

    with tempfile.TemporaryDirectory() as folder:
        dataset = samples.make_dataset(Path(folder), 600, height=100, width=120)
        index, storage = dataset.index("train"), LocalShards(dataset.root)
        decode, crop = make_settings(dataset, device), EvaluationCrop(64)
        loader = Loader(index, storage, plan=EvaluationPlan(len(index), 64), augment=Augmentation(crop), decode=decode)
        torch.manual_seed(0)
        net = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 10))  # answers vary without training
        module = Classifier(net, num_classes=10, recipe=build_recipe(compose("train", ["+model=resnet"])))
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        accelerator = "gpu" if device.type == "cuda" else "cpu"
        trainer = pl.Trainer(accelerator=accelerator, devices=1, precision="bf16-mixed", **quiet)
        (metrics,) = trainer.validate(module, loader, verbose=False)
        module = module.to(device).eval()
        counted: list[int] = []
        hits, ties, answers = torch.zeros(2, dtype=torch.int64), 0, torch.zeros(10, dtype=torch.int64)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            for images, _, names in loader:
                labels = torch.from_numpy(index.rows(names.numpy()).label.astype(np.int64))
                counted += names.tolist()
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
    is_complete = module.evaluated_images == len(index) and sorted(counted) == list(range(len(index)))
    return Answer(is_complete and close and int((answers > 0).sum()) > 1, figures)


def check_cuda_graph(device: torch.device) -> Answer:
    """C8: whether a CUDA graph is captured while DALI's batches are released."""
    if find_decoder(device) is None:
        return Answer(None, {"decoder": "CPU"})
    with tempfile.TemporaryDirectory() as folder:
        loader = training_loader(samples.make_dataset(Path(folder), 400), device, batch_size=32)
        loader._start()
        assert loader._pipeline is not None
        held = [as_torch(loader._pipeline.run()[0]) for _ in range(4)]
        layer, static = torch.nn.Linear(512, 512, device=device), torch.randn(64, 512, device=device)
        expected = layer(static)
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured, capture_error_mode="thread_local"):
                outputs = layer(static)
                held.clear()
            captured.replay()
            torch.cuda.synchronize()
        except RuntimeError as error:
            return Answer(False, {"capture": str(error).splitlines()[0]})
        return Answer(bool(torch.equal(outputs, expected)), {"capture": "survives"})


CHECKS = (
    Check("buffers", "no buffer is reused too early", 180, check_buffers, alone=True),
    Check("bits", "training and resuming repeat their bits", 300, check_bits),
    Check("evaluation", "an evaluation counts every image once", 120, check_evaluation),
    Check("cuda graph", "a CUDA graph survives DALI", 120, check_cuda_graph, on_cpu=False),
)
