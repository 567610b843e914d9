"""Classify JPEGs with a run, beside loops over torchvision's loaders with the same network.

Interleaved in one process, two threads or workers each. torchvision's ImageFolder opens files with Pillow by default;
the second loop decodes them into tensors instead. The last column times the command up to its first row.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from benchmarks.gpu import samples
from data.loading.inputs import find_images
from pipeline import load
from pipeline.runs.trained import TrainedModel

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = {"LeNet-5": ("lenet", "lenet5", 32), "MobileNetV3-S": ("mobilenet", "mobilenet_v3_small", 224)}
BATCH_SIZE, WORKERS = 64, 2


def folder_of(photos: Path, model: TrainedModel, *, tensors: bool) -> ImageFolder:
    """The photographs, prepared as torchvision's reference evaluates."""
    side = model.image_size
    steps = [
        v2.Resize(round(side / 0.875), antialias=True),
        v2.CenterCrop(side),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(model.facts.mean, model.facts.std),
    ]
    options = {"loader": partial(decode_image, mode=ImageReadMode.RGB)} if tensors else {}
    return ImageFolder(str(photos), transform=v2.Compose(steps), **options)


def make_run(folder: Path, name: str) -> None:
    """Train a network for a step on a few of the photographs."""
    model, variant, size = NETWORKS[name]
    words = [f"+model={model}", f"model.variant={variant}", "data=shards", "data.root=packed", "tracking=none"]
    words += [f"data.image_size={size}", "data.batch_size=8", "recipe.epochs=1", "+trainer.limit_train_batches=1"]
    words += ["+trainer.limit_val_batches=1", f"name={name}", "trainer=cpu"]
    command = [sys.executable, "-m", "pipeline.train", *words]
    subprocess.run(command, cwd=folder, env=_environment(), check=True, stdout=subprocess.DEVNULL)


def ours(model: TrainedModel, photos: Path) -> Iterator[str | None]:
    """The answers of the run."""
    for prediction in model.predict_sources(find_images(str(photos), lines=sys.stdin), batch_size=BATCH_SIZE):
        yield prediction.label


@torch.inference_mode()
def theirs(model: TrainedModel, photos: Path, *, tensors: bool) -> Iterator[str | None]:
    """The same by a loop over torchvision's images."""
    dataset = folder_of(photos, model, tensors=tensors)
    for batch, _ in DataLoader(dataset, batch_size=BATCH_SIZE, num_workers=WORKERS):
        probabilities = torch.softmax(model.net(batch.contiguous(memory_format=torch.channels_last)), dim=1)
        yield from (model.classes[number] for number in probabilities.argmax(1).tolist())


WAYS = {
    "Convoy": ours,
    "ImageFolder": partial(theirs, tensors=False),
    "ImageFolder, decode_image": partial(theirs, tensors=True),
}


def timed(way: Callable[[TrainedModel, Path], Iterator[str | None]], model: TrainedModel, photos: Path) -> list[float]:
    """Images per second, and milliseconds of the CPU an image, workers included."""
    process = psutil.Process()
    start, before = time.perf_counter(), sum(process.cpu_times()[:4])
    count = sum(1 for _ in way(model, photos))
    return [count / (time.perf_counter() - start), 1e3 * (sum(process.cpu_times()[:4]) - before) / count]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(WORKERS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        samples.make_dataset(folder, arguments.images)
        print("| network | way | images/s | Convoy / this | CPU ms/image | seconds to the first row |")
        print("|---|---|--:|--:|--:|--:|")
        for network in NETWORKS:
            make_run(folder, network)
            model = load(folder / "runs" / network, device="cpu")
            rounds = [[timed(way, model, folder / "images") for way in WAYS.values()] for _ in range(arguments.rounds)]
            first = f"{seconds_to_first_row(folder, network):.1f}"
            for place, name in enumerate(WAYS):
                rate, cost = (statistics.median(one[place][kind] for one in rounds) for kind in (0, 1))
                ratio = statistics.median(one[0][0] / one[place][0] for one in rounds)
                print(f"| {network} | {name} | {rate:.0f} | {ratio:.2f} | {cost:.2f} | {'' if place else first} |")


def seconds_to_first_row(folder: Path, network: str) -> float:
    """The time of the command until its first answer is printed."""
    command = [sys.executable, "-m", "pipeline.predict", f"run=runs/{network}", "input=images"]
    start = time.perf_counter()
    with subprocess.Popen(
        command, cwd=folder, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()  # the header
        process.stdout.readline()
        seconds = time.perf_counter() - start
        process.kill()
    return seconds


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


if __name__ == "__main__":
    main()
