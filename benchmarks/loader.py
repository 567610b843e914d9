"""Cost of an image: our loader, bare DALI, torchvision's and timm's, interleaved in one run.

    python -m benchmarks.loader            makes 1,000 JPEGs of 500 x 375, then 5 rounds of 3 epochs each

All follow torchvision's reference preset for training: decode, random resized crop to 224 with antialias, flip,
normalise, batch. Those with a policy also erase a rectangle of a quarter of the images ("erasing" only that). Each
loader has two threads or two worker processes. CPU time counts the process and its workers, after one epoch of warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil

IMAGES, HEIGHT, WIDTH, QUALITY = 1000, 375, 500, 88
BATCH_SIZE, THREADS, IMAGE_SIZE = 100, 2, 224
ERASING = 0.25  # probability
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_images(folder: Path) -> None:
    """Write JPEGs of 110 KB that resemble photographs: noise of power 1 / frequency squared, mostly in brightness."""
    import numpy as np
    from PIL import Image

    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None, :])
    frequency[0, 0] = 1
    for number in range(IMAGES):
        noise = np.random.default_rng(number).standard_normal((4, HEIGHT, WIDTH))
        smooth = np.fft.irfft2(np.fft.rfft2(noise) / frequency, s=(HEIGHT, WIDTH))  # (4, H, W)
        brightness, *colours = smooth / smooth.std(axis=(1, 2), keepdims=True)
        pixels = 128 + 50 * brightness + 15 * np.stack(colours)  # (3, H, W)
        path = folder / "train" / f"class{number % 10}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(path, quality=QUALITY)


def convoy(
    folder: Path, *, policy: str | None = None, erases: bool = False, fit: str = "crop"
) -> Callable[[], Iterable[object]]:
    from data.augment import policies
    from data.augment.augmentation import Augmentation
    from data.augment.crops import TrainingCrop
    from data.augment.erasing import RandomErasing
    from data.loading.decoder import DecodeSettings
    from data.loading.loader import TrainingLoader
    from data.loading.order import TrainingPlan
    from data.shards.indexing import open_dataset
    from data.storage.local import LocalShards

    dataset, _ = open_dataset(folder / "shards")
    index = dataset.index("train")
    plan = TrainingPlan(index.shard_samples, seed=0, shuffle_window=4_000_000, batch_size=BATCH_SIZE)
    decode = DecodeSettings(MEAN, STD, threads=THREADS)
    augment = Augmentation(TrainingCrop(IMAGE_SIZE, fit=fit))
    if policy is not None:
        augment = replace(augment, policy=getattr(policies, policy)())
    if policy is not None or erases:
        augment = replace(augment, erasing=RandomErasing(ERASING))
    loader = TrainingLoader(index, LocalShards(dataset.root), plan=plan, augment=augment, decode=decode)
    return lambda: loader


def bare_dali(folder: Path) -> Callable[[], Iterable[object]]:
    import torch.utils.dlpack
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(batch_size=BATCH_SIZE, num_threads=THREADS, device_id=None, exec_dynamic=True, seed=0)
    with pipeline:
        tars = sorted(str(path) for path in (folder / "shards").glob("train-*.tar"))
        encoded, label = fn.readers.webdataset(
            paths=tars, ext=["jpg", "cls"], random_shuffle=True, initial_fill=1000, missing_component_behavior="error"
        )
        decoded = fn.decoders.image_random_crop(
            encoded, output_type=types.RGB, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
        )
        resized = fn.resize(decoded, size=[IMAGE_SIZE, IMAGE_SIZE], interp_type=types.INTERP_LINEAR, antialias=True)
        mean, std = [value * 255 for value in MEAN], [value * 255 for value in STD]
        flip = fn.random.coin_flip()
        images = fn.crop_mirror_normalize(
            resized, mirror=flip, mean=mean, std=std, dtype=types.FLOAT, output_layout="HWC"
        )
        pipeline.set_outputs(images, label)
    pipeline.build()

    def epoch() -> Iterator[object]:
        for _ in range(IMAGES // BATCH_SIZE):
            images, labels = pipeline.run()
            yield torch.utils.dlpack.from_dlpack(images.as_tensor()), labels

    return epoch


def torchvision_tensor(folder: Path) -> Callable[[], Iterable[object]]:
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(IMAGE_SIZE, antialias=True)
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(), *_to_normalised(v2)])
    return _torch_loader(ImageFolder(folder / "train", transform, loader=lambda p: decode_image(p, ImageReadMode.RGB)))


def torchvision_pil(folder: Path) -> Callable[[], Iterable[object]]:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(IMAGE_SIZE)
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor(), *_to_normalised(v2)])
    return _torch_loader(ImageFolder(folder / "train", transform))


def timm(folder: Path, *, policy: str | None = None) -> Callable[[], Iterable[object]]:
    from timm.data import create_dataset, create_loader

    dataset = create_dataset("", str(folder / "train"), is_training=True)
    loader = create_loader(
        dataset,
        (3, IMAGE_SIZE, IMAGE_SIZE),
        BATCH_SIZE,
        is_training=True,
        use_prefetcher=False,  # timm's prefetcher needs a GPU
        no_aug=False,
        color_jitter=None,
        auto_augment=policy,
        re_prob=ERASING if policy else 0.0,
        re_mode="pixel",
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        num_workers=THREADS,
        persistent_workers=True,
    )
    return lambda: loader


LOADERS = {
    "convoy": convoy,
    "convoy, TrivialAugment": partial(convoy, policy="TrivialAugment"),
    "convoy, RandAugment": partial(convoy, policy="TimmRandAugment"),
    "convoy, torchvision's RandAugment": partial(convoy, policy="RandAugment"),
    "convoy, AutoAugment": partial(convoy, policy="AutoAugment"),
    "convoy, jitter": partial(convoy, policy="ColorJitter"),
    "convoy, erasing": partial(convoy, erases=True),
    "convoy, fit=pad": partial(convoy, fit="pad"),
    "convoy, fit=squash": partial(convoy, fit="squash"),
    "bare DALI": bare_dali,
    "torchvision, tensor": torchvision_tensor,
    "torchvision, PIL": torchvision_pil,
    "timm": timm,
    # At level 10 it would keep 0 bits, which Pillow 12 refuses.
    "timm, RandAugment": partial(timm, policy="rand-m8-mstd0-inc1"),
}


def measure(name: str, folder: Path, epochs: int) -> dict[str, float]:
    """Measure images/s and CPU milliseconds per image of one loader, in this process."""
    epoch = LOADERS[name](folder)
    for _ in epoch():
        pass
    cpu, start = _cpu_seconds(), time.perf_counter()
    batches = sum(1 for _ in range(epochs) for _ in epoch())
    seconds = time.perf_counter() - start
    images = batches * BATCH_SIZE
    assert images == IMAGES * epochs, f"{name} returned {images} images"
    return {"images_per_second": images / seconds, "cpu_ms": 1000 * (_cpu_seconds() - cpu) / images}


def measure_all(folder: Path, *, names: list[str], rounds: int, epochs: int) -> dict[str, list[dict[str, float]]]:
    """Measure each loader in its own process, one round after the other."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, measured in results.items():
            command = [sys.executable, "-m", "benchmarks.loader", "--epochs", str(epochs), "--one", name, str(folder)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            measured.append(json.loads(output.splitlines()[-1]))
    return results


def main() -> None:
    """Make the images, run the rounds, print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=list(LOADERS), choices=LOADERS)
    parser.add_argument("--one", nargs=2, metavar=("LOADER", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], Path(arguments.one[1]), arguments.epochs)))
        return
    with tempfile.TemporaryDirectory() as name:
        make_images(Path(name))
        _pack(Path(name))
        results = measure_all(Path(name), names=arguments.only, rounds=arguments.rounds, epochs=arguments.epochs)
    print(f"{'loader':<36}{'images/s':>10}{'CPU ms/image':>14}{'first / its CPU':>16}   medians of {arguments.rounds}")
    ours = [one["cpu_ms"] for one in results[arguments.only[0]]]
    for name, measured in results.items():
        cpu = [one["cpu_ms"] for one in measured]
        ratio = statistics.median(own / other for own, other in zip(ours, cpu, strict=True))
        speed = statistics.median(one["images_per_second"] for one in measured)
        print(f"{name:<36}{speed:>10.0f}{statistics.median(cpu):>14.2f}{ratio:>16.2f}")


def _pack(folder: Path) -> None:
    from data.shards import sources
    from data.shards.pack import PackSettings, pack

    source = sources.folder(folder / "train", "benchmark", val_fraction=0, seed=0)
    pack(source, folder / "shards", settings=PackSettings(shard_samples=250))


def _torch_loader(dataset: object) -> Callable[[], Iterable[object]]:
    from torch.utils.data import DataLoader

    loader = DataLoader(dataset, BATCH_SIZE, shuffle=True, num_workers=THREADS, persistent_workers=True)
    return lambda: loader


def _to_normalised(v2: object) -> list[object]:
    import torch

    return [v2.ToDtype(torch.float, scale=True), v2.Normalize(MEAN, STD)]


def _cpu_seconds() -> float:
    process = psutil.Process()
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


if __name__ == "__main__":
    main()
