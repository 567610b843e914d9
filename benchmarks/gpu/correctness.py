"""Checks of what the images are: decoders, the graph, buffers, damage, bits, counts."""

import contextlib
import hashlib
import itertools
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as v2

from benchmarks.gpu import samples
from benchmarks.gpu.checks import ROOT, Answer, Check
from benchmarks.gpu.loaders import MEAN, STD, probe_of, settings_of, training_loader
from data.loading import graph
from data.loading.crops import EvaluationCrop, TrainingCrop
from data.loading.decoder import GpuDecoder
from data.loading.loader import EncodedBatch, Loader
from data.loading.order import EvaluationPlan, Position
from data.loading.probe import Probe, decoded_images, nvjpeg_version, try_decoder
from data.loading.storage import LocalShards
from data.shards.dataset import Dataset
from data.shards.images import UnreadableImage, oriented_size

PACKAGES = (
    *("torch", "torchvision", "pytorch-lightning", "nvidia-dali-cuda130"),
    *("nvidia-nvimgcodec-cu13", "nvidia-nvjpeg"),
)
Ints = NDArray[np.int32]
LOSSLESS = ("PNG", "WebP lossless")
MAX_MEAN, MAX_TAIL = 1.0, 12.0  # levels: mean and 99.9th percentile of the difference between two JPEG decoders


def versions(device: torch.device) -> Answer:
    """C0: what is installed, and whether nvImageCodec finds nvJPEG."""
    figures: dict[str, object] = {"Python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            figures[package] = metadata.version(package)
    if device.type == "cpu":
        return Answer(None, figures)
    properties = torch.cuda.get_device_properties(device)
    figures |= {"GPU": properties.name, "GiB": round(properties.total_memory / 2**30, 1), "CUDA": torch.version.cuda}
    program = "from benchmarks.gpu import correctness as c; c.decode_some(c.GpuDecoder())"
    environment = {**os.environ, "DALI_NVIMGCODEC_LOG_LEVEL": "4"}
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    log = [line for line in (answer.stdout + answer.stderr).splitlines() if "ngine" in line or "nvjpeg" in line.lower()]
    figures["log"] = log[:6]
    loads = answer.returncode == 0 and bool(log) and not any("Failed to load" in line for line in log)
    return Answer(loads, figures | {"exit code": answer.returncode})


def regions(device: torch.device) -> Answer:
    """C1: which settings decode random crops of random batches without a crash."""
    answers: dict[str, str] = {}
    mixed = [one for name, made in samples.groups().items() if name.startswith(("JPEG 4", "JPEG g")) for one in made]
    mixes = {"4:2:0": samples.jpegs(16, height=150, width=200), "mixed": mixed}
    sizes = (1, 16, 256) if device.type == "cuda" else (1, 16)
    decoders: list[GpuDecoder | None] = [None]
    if device.type == "cuda":
        options = itertools.product((True, False), (0.65, 0.0), (True, False))
        decoders = [GpuDecoder(scope, load, fancy) for scope, load, fancy in options]
    for decoder, (mix, images), size in itertools.product(decoders, mixes.items(), sizes):
        batch = list(itertools.islice(itertools.cycle(images), size))
        fancy = "" if decoder is None else f", fancy {decoder.fancy_upsampling}"
        failure = try_decoder(probe_of(batch, device, decoder=decoder))
        answers[f"{decoder or 'CPU'}{fancy}: {size} of {mix}"] = failure or "ok"
    failed = {name: failure for name, failure in answers.items() if failure != "ok"}
    sound = sorted({name.partition(":")[0] for name in answers} - {name.partition(":")[0] for name in failed})
    figures = {"sound": sound, "failed": failed, "nvJPEG": nvjpeg_version()}
    return Answer(bool(sound), figures)


def decoders(device: torch.device) -> Answer:
    """C2: this device's decoder against the CPU's, by kind of image; on a CPU, regions against entire images."""
    figures: dict[str, object] = {}
    holds = True
    for name, images in samples.groups().items():
        differences = [difference for one in images for difference in _differences(one, images, device=device)]
        joined = np.concatenate(differences)
        mean, tail, largest = float(joined.mean()), float(np.quantile(joined, 0.999)), int(joined.max())
        figures[name] = f"mean {mean:.2f}, 99.9th {tail:.0f}, most {largest}"
        if device.type == "cpu" or name.startswith(LOSSLESS):
            holds &= largest == 0
        elif "CMYK" not in name:
            holds &= mean <= MAX_MEAN and tail <= MAX_TAIL
    return Answer(holds, figures)


def _differences(image: bytes, others: list[bytes], *, device: torch.device) -> Iterator[NDArray[np.int16]]:
    """Absolute differences over crops at every border, with the image first and last in a batch."""
    height, width = oriented_size(image)
    crops = [(0, 0, height, width), (1, 3, height // 2, width // 2), (0, width // 3, 1, 1)]
    crops += [(height - 7, 0, 7, width), (0, width - 5, height, 5)]
    for top, left, rows, columns in crops:
        batch = [image, *others[:2], image]
        anchors = np.array([[top, left], [0, 0], [0, 0], [top, left]], np.int32)
        shapes = np.array([[rows, columns], [9, 9], [9, 9], [rows, columns]], np.int32)
        ours = _decoded(batch, anchors, shapes, decoder=GpuDecoder() if device.type == "cuda" else None)
        theirs = _entire(batch, anchors, shapes)
        assert all(one.shape == other.shape for one, other in zip(ours, theirs, strict=True))
        assert np.array_equal(ours[0], ours[-1]), "the same image differs between two places of a batch"
        yield np.abs(ours[0].astype(np.int16) - theirs[0]).ravel()


def _decoded(
    batch: list[bytes], anchors: NDArray[np.int32], shapes: NDArray[np.int32], *, decoder: GpuDecoder | None
) -> list[NDArray[np.uint8]]:
    inputs = [np.frombuffer(one, np.uint8) for one in batch]
    device_id = None if decoder is None else 0
    with Pipeline(batch_size=len(batch), num_threads=2, device_id=device_id, exec_dynamic=True) as pipeline:
        encoded, anchor, shape = fn.external_source(source=lambda: (inputs, anchors, shapes), num_outputs=3, batch=True)
        pipeline.set_outputs(graph._decode(encoded, (anchor, shape), decoder=decoder))
    (output,) = pipeline.run()
    output = output if decoder is None else output.as_cpu()
    return [np.asarray(output.at(number)) for number in range(len(batch))]


def _entire(batch: list[bytes], anchors: NDArray[np.int32], shapes: NDArray[np.int32]) -> list[NDArray[np.uint8]]:
    inputs = [np.frombuffer(one, np.uint8) for one in batch]
    with Pipeline(batch_size=len(batch), num_threads=2, device_id=None, exec_dynamic=True) as pipeline:
        encoded = fn.external_source(source=lambda: inputs, batch=True)
        pipeline.set_outputs(fn.decoders.image(encoded, device="cpu", output_type=types.DALIImageType.RGB))
    (output,) = pipeline.run()
    cuts = [tuple(slice(*pair) for pair in zip(a, a + s, strict=True)) for a, s in zip(anchors, shapes, strict=True)]
    return [np.asarray(output.at(number))[cut] for number, cut in enumerate(cuts)]


def decode_some(decoder: GpuDecoder) -> None:
    """Decode a few JPEGs on the GPU."""
    shapes = np.full((4, 2), 50, np.int32)
    _decoded(samples.jpegs(4, height=100, width=100), np.zeros((4, 2), np.int32), shapes, decoder=decoder)


def graphs(device: torch.device) -> Answer:
    """C3: batches of PNGs against torchvision, those of an evaluation on a GPU against the CPU's graph."""
    images = [samples.encode(samples.photograph(120, 160, seed=number), "PNG") for number in range(5)]
    decoder = GpuDecoder() if device.type == "cuda" else None
    inside: dict[str, float] = {}
    figures: dict[str, object] = {}
    for crop in (TrainingCrop(64), EvaluationCrop(64)):
        probe = probe_of(images, device, decoder=decoder, crop=crop)
        if isinstance(crop, TrainingCrop):
            _, anchors, shapes, mirrors = probe.inputs
            crops = zip(images, anchors, shapes, mirrors, strict=True)
            expected = torch.stack([_by_torchvision(one, (a, s), mirror=bool(m)) for one, a, s, m in crops])
        elif device.type == "cuda":
            expected = _levels(probe._replace(decode=replace(probe.decode, device_id=None, gpu_decoder=None)))
        else:
            expected = torch.stack([_center_by_torchvision(one) for one in images])
        difference = (_levels(probe) - expected).abs()
        name = type(crop).__name__
        inside[name] = float(difference[:, 4:-4, 4:-4].max())
        figures[name] = f"inside {inside[name]:.3f}, border {float(difference.max()):.3f} levels"
    return Answer(max(inside.values()) < 1.001, figures)


def _levels(probe: Probe) -> Tensor:
    if probe.decode.crops_only:
        return decoded_images(probe).float()
    return (decoded_images(probe) * torch.tensor(STD) + torch.tensor(MEAN)) * 255  # (N, H, W, 3)


def _by_torchvision(image: bytes, rectangle: tuple[Ints, Ints], *, mirror: bool) -> Tensor:
    anchor, shape = rectangle
    resized = v2.resized_crop(_pixels(image), *anchor.tolist(), *shape.tolist(), [64, 64], antialias=True)
    return (v2.hflip(resized) if mirror else resized).permute(1, 2, 0).float()


def _center_by_torchvision(image: bytes) -> Tensor:
    resized = v2.resize(_pixels(image), [round(64 / 0.875)], antialias=True)
    return v2.center_crop(resized, [64, 64]).permute(1, 2, 0).float()


def _pixels(image: bytes) -> Tensor:
    return decode_image(torch.frombuffer(bytearray(image), dtype=torch.uint8), ImageReadMode.RGB)  # (3, H, W)


class Poisoned(deque[NDArray[np.uint8]]):
    """Buffers that are overwritten as soon as the loader gives them back."""

    def append(self, buffer: NDArray[np.uint8]) -> None:
        buffer.fill(0xFF)
        super().append(buffer)


def buffers(device: torch.device) -> Answer:
    """C4: checksums of every sample of two epochs, at leisure and under load with poisoned buffers."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = samples.make_dataset(Path(folder), 600, height=150, width=200)
        calm, busy = (_checksums(dataset, device, busy=busy) for busy in (False, True))
    return Answer(calm == busy, {"samples": len(calm), "different": sum(calm[key] != busy.get(key) for key in calm)})


def _checksums(dataset: Dataset, device: torch.device, *, busy: bool) -> dict[tuple[int, int], int]:
    loader = training_loader(dataset, device, batch_size=32)
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


def damage(device: torch.device) -> Answer:
    """C5: damaged files are named, or decode without an error where the decoder cannot know."""
    sound = samples.jpegs(8, height=150, width=200)
    generator = np.random.default_rng(0)
    flipped = np.frombuffer(sound[3], np.uint8).copy()
    flipped[generator.integers(600, len(flipped) - 2, 50)] ^= 1
    cases = {"cut at 60 %": sound[3][: len(sound[3]) * 6 // 10], "50 flipped bits": flipped.tobytes()}
    cases |= {"zeroed header": bytes(40) + sound[3][40:], "empty": b""}
    figures, holds = {}, True
    with tempfile.TemporaryDirectory() as folder:
        dataset = samples.make_dataset(Path(folder), 40, height=150, width=200)
        for name, bad in cases.items():
            loader = training_loader(dataset, device, batch_size=8)
            sample, start = int(loader.plan.samples(0, 1)[2]), time.perf_counter()
            _damage(loader, bad)
            try:
                list(itertools.islice(loader, 3))
                outcome = "silent"
            except UnreadableImage as error:
                outcome = "named" if loader.index.keys([sample])[0] in str(error) else "misnamed"
            except RuntimeError as error:
                outcome = f"raised: {str(error).splitlines()[-1]}"
            figures[name] = f"{outcome}, {time.perf_counter() - start:.1f} s"
            holds &= outcome == "named" or (outcome == "silent" and name == "50 flipped bits")
    return Answer(holds, figures)


def _damage(loader: Loader, bad: bytes) -> None:
    read = loader._read

    def with_damage(position: Position) -> EncodedBatch:
        batch = read(position)
        images = [*batch.images[:2], np.frombuffer(bad, np.uint8), *batch.images[3:]]
        return batch._replace(images=images) if position.step == 1 else batch

    loader._read = with_damage


def memory(device: torch.device) -> Answer:
    """C5: memory that DALI lacks is blamed on memory."""
    with tempfile.TemporaryDirectory() as folder:
        loader = training_loader(samples.make_dataset(Path(folder), 600), device, batch_size=512)
        free, _ = torch.cuda.mem_get_info(device)
        ballast = torch.empty(free - 200 * 2**20, dtype=torch.uint8, device=device)
        try:
            next(iter(loader))
            answer = "it fitted"
        except RuntimeError as error:
            answer = type(error).__name__
    decoder = loader.decode.gpu_decoder
    holds = answer == "OutOfMemoryError" if decoder is not None and len(ballast) else None
    return Answer(holds, {"answer": answer, "decoder": str(decoder or "CPU")})


def bits(device: torch.device) -> Answer:
    """C6: the weights after 40 steps, twice, and after 20 and a resume."""
    figures: dict[str, object] = {}
    holds = True
    for deterministic in (False, True) if device.type == "cuda" else (False,):
        with tempfile.TemporaryDirectory() as folder:
            one, two, resumed = (_trained(Path(folder), name, device, deterministic) for name in ("a", "b", "cut"))
        name = "deterministic" if deterministic else "default"
        figures[name] = {"twice": one == two, "resumed": one == resumed}
        holds &= (one == two == resumed) or (device.type == "cuda" and not deterministic)
    return Answer(holds, figures)


def _trained(folder: Path, name: str, device: torch.device, deterministic: bool) -> str:
    """Train two epochs of 20 steps, the run `cut` with a SIGKILL after the first; return a digest of the weights."""
    words = ["+model=resnet", "recipe.epochs=2", "+trainer.limit_train_batches=20", "tracking=none", f"name={name}"]
    words += [f"trainer={'cpu' if device.type == 'cpu' else 'gpu'}", "log_every=20", "recipe.schedule.warmup_epochs=1"]
    words += ["+trainer.deterministic=true"] if deterministic else []
    command = [sys.executable, "-m", "pipeline.train", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if name == "cut":
        with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            any("epoch 1/2  val" in line for line in process.stdout)
            last = folder / "runs" / name / "checkpoints" / "last.ckpt"
            while not last.is_file() and process.poll() is None:  # it follows the evaluation
                time.sleep(0.01)
            process.kill()
        assert not (folder / "runs" / name / "result.json").exists(), "it finished before it could be killed"
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    last = folder / "runs" / name / "checkpoints" / "last.ckpt"
    state = torch.load(last, weights_only=True, map_location="cpu")["state_dict"]
    return hashlib.sha256(b"".join(one.numpy().tobytes() for one in state.values())).hexdigest()


def evaluation(device: torch.device) -> Answer:
    """C7: images and hits of an evaluation in bfloat16, against a count by hand."""
    import pytorch_lightning as pl

    from models.analysis.fresh_norms import estimated_norms
    from models.learning.classifier import Classifier
    from models.residual import resnet
    from pipeline.build.network import build_recipe
    from pipeline.cli.compose import compose

    with tempfile.TemporaryDirectory() as folder:
        dataset = samples.make_dataset(Path(folder), 600, height=100, width=120)
        index, storage = dataset.index("train"), LocalShards(dataset.root)
        decode, crop = settings_of(dataset, device), EvaluationCrop(64)
        loader = Loader(index, storage, plan=EvaluationPlan(len(index), 64), crop=crop, decode=decode)
        torch.manual_seed(0)
        net = resnet("resnet18", num_classes=10, image_size=64)
        module = Classifier(net, num_classes=10, recipe=build_recipe(compose("train", ["+model=resnet"])))
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        accelerator = "gpu" if device.type == "cuda" else "cpu"
        trainer = pl.Trainer(accelerator=accelerator, devices=1, precision="bf16-mixed", **quiet)
        first = next(iter(loader)).images.to("cpu")
        hits, ties = torch.zeros(2, dtype=torch.int64), 0
        with estimated_norms(net, first):  # otherwise an untrained network has one answer for all images
            (metrics,) = trainer.validate(module, loader, verbose=False)
            module = module.to(device).eval()
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
                for images, labels, _ in loader:
                    values, order = (one.cpu() for one in module(images.to(device)).float().topk(6))
                    ties += int((values[:, 1:] == values[:, :-1]).any(1).sum())  # either class may come first
                    right = order[:, :5] == labels[:, None]
                    hits += torch.stack([right[:, 0].sum(), right.any(1).sum()])
    expected = (hits.double() / len(index)).tolist()
    found = [metrics["val/top1"], metrics["val/top5"]]
    figures = {"images": module.evaluated_images, "of": len(index), "found": found, "by hand": expected}
    figures["ties"] = ties
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
    Check("versions", "nvImageCodec loads nvJPEG", 120, versions),
    Check("regions", "a setting decodes crops of every batch", 300, regions),
    Check("decoders", "the device's decoder gives the CPU's pixels", 180, decoders),
    Check("graphs", "the graph gives torchvision's images", 120, graphs),
    Check("buffers", "no buffer is reused too early", 180, buffers),
    Check("damage", "damaged files are named", 180, damage),
    Check("memory", "out of memory is blamed on memory", 120, memory, on_cpu=False),
    Check("bits", "training and resuming repeat their bits", 300, bits),
    Check("evaluation", "an evaluation counts every image once", 120, evaluation),
    Check("cuda graph", "a CUDA graph survives DALI", 60, cuda_graph, on_cpu=False),
)
