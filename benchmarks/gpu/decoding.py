"""Checks of images: decoders, the graph, damage, memory."""

import contextlib
import itertools
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as v2

from benchmarks.gpu import samples
from benchmarks.gpu.checks import ROOT, Answer, Check, PrintedFigures
from benchmarks.gpu.loaders import MEAN, STD, find_decoder, make_probe, training_loader
from data.augment.crops import EvaluationCrop, TrainingCrop
from data.draws import Samples
from data.loading import graph
from data.loading.decoder import GpuDecoder
from data.loading.loader import TrainingLoader
from data.loading.nvjpeg import loaded_nvjpeg
from data.loading.probe import FANCY_REGIONS, Probe, decoded_images, try_decoder
from data.shards.dataset import Dataset, Rows
from data.shards.images import UnreadableImage, oriented_size

PACKAGES = (
    *("torch", "torchvision", "pytorch-lightning", "nvidia-dali-cuda130"),
    *("nvidia-nvimgcodec-cu13", "nvidia-nvjpeg"),
)
Ints = NDArray[np.int32]
Bytes = NDArray[np.uint8]
TRIES_AT_ONCE = 4
SOUND = "decodes all"
MAX_AT_BORDER = 16.0  # levels: DALI's resize repeats the last pixel there
FREE = 60 * 2**20  # bytes that are left on the GPU, less than a batch
LOSSLESS = ("PNG", "WebP lossless")
MAX_MEAN, MAX_TAIL = 1.0, 12.0  # levels: mean and 99.9th percentile of the difference between two JPEG decoders


def check_versions(device: torch.device) -> Answer:
    """C0: what is installed, and whether nvImageCodec finds nvJPEG."""
    figures: dict[str, object] = {"Python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            figures[package] = metadata.version(package)
    nvjpeg, figures["nvJPEG"] = loaded_nvjpeg(), _version()
    if device.type == "cpu":
        return Answer(None, figures)
    properties = torch.cuda.get_device_properties(device)
    figures |= {"GPU": properties.name, "GiB": round(properties.total_memory / 2**30, 1), "CUDA": torch.version.cuda}
    program = "from benchmarks.gpu import decoding as c; c.decode_some(c.GpuDecoder())"
    environment = {**os.environ, "DALI_NVIMGCODEC_LOG_LEVEL": "4"}
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    log = [line for line in (answer.stdout + answer.stderr).splitlines() if "ngine" in line or "nvjpeg" in line.lower()]
    figures["log"] = [
        re.sub(r"\x1b\[[0-9;]*m", "", line) for line in log if "version:" not in line or "JPEG version" in line
    ]
    loads = answer.returncode == 0 and bool(log) and not any("Failed to load" in line for line in log)
    loads &= nvjpeg is not None and nvjpeg[0] >= FANCY_REGIONS
    return Answer(loads, figures | {"exit code": answer.returncode})


def _version() -> str:
    nvjpeg = loaded_nvjpeg()
    return "none" if nvjpeg is None else ".".join(map(str, nvjpeg[0]))


def check_regions(device: torch.device) -> Answer:
    """C1: which settings decode random crops of random batches without a crash."""
    mixed = [one for name, made in samples.groups().items() if name.startswith(("JPEG 4", "JPEG g")) for one in made]
    mixes = {"4:2:0": samples.jpegs(16, height=150, width=200), "mixed": mixed}
    sizes = (1, 16, 256) if device.type == "cuda" else (1, 16)
    decoders: list[GpuDecoder | None] = [None]
    if device.type == "cuda":
        options = itertools.product((True, False), (1.0, 0.65, 0.0), (True, False))
        decoders = [GpuDecoder(scope, load, fancy) for scope, load, fancy in options]
    batches = {
        f"{size} of {mix}": list(itertools.islice(itertools.cycle(images), size))
        for (mix, images), size in itertools.product(mixes.items(), sizes)
    }
    figures = PrintedFigures(nvJPEG=_version())
    with ThreadPoolExecutor(TRIES_AT_ONCE) as threads:
        failures = threads.map(lambda decoder: _failed_batches(decoder, batches, device=device), decoders)
        for decoder, found in zip(decoders, failures, strict=True):
            name = "CPU" if decoder is None else f"{decoder}, fancy upsampling {decoder.fancy_upsampling}"
            figures[name] = found or SOUND
    holds = SOUND in figures.values() if device.type == "cuda" else None  # a CPU is compared with itself
    return Answer(holds, figures)


def _failed_batches(
    decoder: GpuDecoder | None, batches: Mapping[str, list[bytes]], *, device: torch.device
) -> dict[str, str]:
    """Why a decoder fails, by batch: all in one process, and if that fails each in its own."""
    probes = {name: make_probe(batch, device, decoder=decoder) for name, batch in batches.items()}
    together = try_decoder(*probes.values())
    if together is None:
        return {}
    failures = {name: try_decoder(probe) for name, probe in probes.items()}
    return {name: failure for name, failure in failures.items() if failure} or {"all in one process": together}


def check_decoders(device: torch.device) -> Answer:
    """C2: this device's decoder against the CPU's, by kind of image; on a CPU, regions against entire images."""
    decoder = find_decoder(device) if device.type == "cuda" else None
    figures: dict[str, object] = {"decoder": str(decoder or "CPU")}
    groups = samples.groups()
    ways = {"": decoder}
    if decoder is not None:
        ways[", fancy upsampling off"] = replace(decoder, fancy_upsampling=False)
    holds = True
    for suffix, way in ways.items():
        for name, found in _differences(groups, way).items():
            if not suffix or name.startswith("JPEG 4"):
                figures[f"{name}{suffix}"] = str(found)
            if suffix or (decoder is not None and ("CMYK" in name or "YCCK" in name)):
                continue
            exact = device.type == "cpu" or name.startswith(LOSSLESS)
            holds &= found.most == 0 if exact else found.mean <= MAX_MEAN and found.tail <= MAX_TAIL
    return Answer(holds, figures)


class Difference(NamedTuple):
    """Absolute difference between two decoders, in levels."""

    mean: float
    tail: float  # 99.9th percentile
    most: int

    def __str__(self) -> str:
        return f"mean {self.mean:.2f}, 99.9th {self.tail:.0f}, most {self.most}"


def _differences(groups: Mapping[str, list[bytes]], decoder: GpuDecoder | None) -> dict[str, Difference]:
    """Crops at every border of every image, all in one batch that is decoded twice, beside the CPU's entire images."""
    crops = [
        (name, image, rectangle)
        for name, images in groups.items()
        for image in images
        for rectangle in _rectangles(*oriented_size(image))
    ]
    crops.append(crops[0])  # the same image first and last
    batch = [image for _, image, _ in crops]
    anchors, shapes = (np.array([rectangle[part] for *_, rectangle in crops], np.int32) for part in (0, 1))
    ours, again = _decoded(batch, anchors, shapes, decoder=decoder)
    theirs = _entire(batch, anchors, shapes)
    assert all(one.shape == other.shape for one, other in zip(ours, theirs, strict=True)), "other shapes"
    assert all(np.array_equal(one, other) for one, other in zip(ours, again, strict=True)), "differs from run to run"
    assert np.array_equal(ours[0], ours[-1]), "the same image differs between two places of a batch"
    levels: dict[str, list[NDArray[np.int16]]] = {name: [] for name in groups}
    for (name, *_), one, other in zip(crops, ours, theirs, strict=True):
        levels[name].append(np.abs(one.astype(np.int16) - other).ravel())
    joined = {name: np.concatenate(found) for name, found in levels.items()}
    return {
        name: Difference(float(one.mean()), float(np.quantile(one, 0.999)), int(one.max()))
        for name, one in joined.items()
    }


def _rectangles(height: int, width: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """All of an image, its inside from odd anchors, one pixel, and strips at its borders: anchor and shape."""
    inside = ((1, 3), (height // 2, width // 2))
    strips = [((height - 7, 0), (7, width)), ((0, width - 5), (height, 5)), ((0, 0), (3, width)), ((0, 0), (height, 3))]
    return [((0, 0), (height, width)), inside, ((0, width // 3), (1, 1)), *strips]


def _decoded(
    batch: list[bytes], anchors: Ints, shapes: Ints, *, decoder: GpuDecoder | None
) -> tuple[list[Bytes], list[Bytes]]:
    """The crops of a batch, twice."""
    inputs = [np.frombuffer(one, np.uint8) for one in batch]
    device_id = None if decoder is None else 0
    with Pipeline(batch_size=len(batch), num_threads=2, device_id=device_id, exec_dynamic=True) as pipeline:
        encoded, anchor, shape = fn.external_source(source=lambda: (inputs, anchors, shapes), num_outputs=3, batch=True)
        pipeline.set_outputs(graph.decode_crops(encoded, (anchor, shape), decoder=decoder))
    outputs = [pipeline.run()[0] for _ in range(2)]
    on_cpu = outputs if decoder is None else [one.as_cpu() for one in outputs]
    first, second = ([np.asarray(one.at(number)) for number in range(len(batch))] for one in on_cpu)
    return first, second


def _entire(batch: list[bytes], anchors: Ints, shapes: Ints) -> list[Bytes]:
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


def check_graphs(device: torch.device) -> Answer:
    """C3: batches of PNGs against torchvision, those of an evaluation on a GPU against the CPU's graph."""
    images = [samples.encode(samples.photograph(120, 160, seed=number), "PNG") for number in range(5)]
    decoder = find_decoder(device) if device.type == "cuda" else None
    holds = True
    figures: dict[str, object] = {}
    for crop in (TrainingCrop(64), EvaluationCrop(64)):
        probe = make_probe(images, device, decoder=decoder, crop=crop)
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
        inside, border = float(difference[:, 4:-4, 4:-4].max()), float(difference.max())
        figures[name] = f"inside {inside:.3f}, border {border:.3f} levels"
        holds &= inside < 1.001 and border < MAX_AT_BORDER  # false for NaN
    return Answer(holds, figures)


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


def check_damage(device: torch.device) -> Answer:
    """C5: damaged files are named, or decode without an error where the decoder cannot know."""
    figures, holds = {}, True
    for name, change in DAMAGES.items():
        with tempfile.TemporaryDirectory() as folder:
            dataset = samples.make_dataset(Path(folder), 40, height=150, width=200)
            loader = training_loader(dataset, device, batch_size=8)
            sample, start = int(loader.plan.samples(0, 1)[5]), time.perf_counter()
            if isinstance(change, float):
                _cut(loader, sample, change)
            else:
                _rewrite(dataset, sample, change)
            try:
                list(itertools.islice(loader, 3))
                outcome = "silent"
            except UnreadableImage as error:
                names = f"cannot be decoded: {loader.index.keys([sample])[0]} ("  # that one alone
                outcome = "named" if str(error).startswith(names) else f"misnamed: {error}"
            except RuntimeError as error:
                outcome = f"raised: {str(error).splitlines()[-1]}"
            figures[name] = f"{outcome}, {time.perf_counter() - start:.1f} s"
            holds &= outcome == "named" or (outcome == "silent" and name == "50 flipped bits")
    return Answer(holds, figures)


def _flip(encoded: Bytes) -> None:
    encoded[np.random.default_rng(0).integers(600, len(encoded) - 2, 50)] ^= 1


def _rewrite(dataset: Dataset, sample: int, change: Callable[[Bytes], None]) -> None:
    """Change the bytes of an image in its shard."""
    index = dataset.index("train")
    rows = index.rows(np.array([sample]))
    with (dataset.root / index.split.shards[int(rows.shard[0])].file).open("r+b") as shard:
        shard.seek(int(rows.offset[0]))
        encoded = np.frombuffer(shard.read(int(rows.size[0])), np.uint8).copy()
        change(encoded)
        shard.seek(int(rows.offset[0]))
        shard.write(encoded.tobytes())


def _cut(loader: TrainingLoader, sample: int, share: float) -> None:
    """Let the index say that a shard has only a part of an image."""
    rows_of = loader.index.rows

    def rows(samples: Samples) -> Rows:
        rows = rows_of(samples)
        return rows._replace(size=np.where(samples == sample, (rows.size * share).astype(rows.size.dtype), rows.size))

    loader.index.rows = rows


DAMAGES: dict[str, Callable[[Bytes], None] | float] = {  # a change of the bytes, or the share that is left
    "cut at 60 %": 0.6,
    "empty": 0.0,
    "50 flipped bits": _flip,
    "zeroed header": lambda encoded: encoded[:40].fill(0),
    "all zeros": lambda encoded: encoded.fill(0),
}


def check_memory(device: torch.device) -> Answer:
    """C5: memory that DALI lacks is blamed on memory."""
    with tempfile.TemporaryDirectory() as folder:
        loader = training_loader(samples.make_dataset(Path(folder), 600), device, batch_size=512)
        free, _ = torch.cuda.mem_get_info(device)
        ballast = torch.empty(free - FREE, dtype=torch.uint8, device=device)
        left, _ = torch.cuda.mem_get_info(device)
        answer, by_dali = "it fitted", False
        try:
            next(iter(loader))
        except RuntimeError as error:
            answer, by_dali = type(error).__name__, error.__cause__ is not None
    decoder = loader.decode.gpu_decoder
    figures = {"answer": answer, "by DALI": by_dali, "MB that were left": left >> 20, "decoder": str(decoder or "CPU")}
    is_full = len(ballast) > 0 and left <= FREE
    return Answer(answer == "OutOfMemoryError" if decoder is not None and is_full else None, figures)


CHECKS = (
    Check("versions", "nvImageCodec loads nvJPEG", 120, check_versions),
    Check("regions", "a setting decodes crops of every batch", 300, check_regions),
    Check("decoders", "the device's decoder gives the CPU's pixels", 120, check_decoders),
    Check("graphs", "the graph gives torchvision's images", 60, check_graphs),
    Check("damage", "damaged files are named", 120, check_damage),
    Check("memory", "out of memory is blamed on memory", 60, check_memory, on_cpu=False, alone=True),
)
