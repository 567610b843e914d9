"""Training steps of our networks and the publishers', interleaved in one run.

    python -m benchmarks.networks                       the six, 20 rounds each
    python -m benchmarks.networks resnet50 --rounds 40

Both get the same images, precision, memory format, optimizer and stochastic depth: float32, then bfloat16 if the device
has units for it. Throughput is by CPU time on a CPU and by wall-clock time on a GPU; the target is a ratio of at
least 0.98.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from models.attention import coatnet, convnext
from models.layers import ConvNet
from models.residual import resnet
from models.separable import efficientnet, mobilenet
from pipeline.build.trainer import choose_precision

STEPS = 2  # per round
WARMUP_ROUNDS = 2


class Contest(NamedTuple):
    """Our network, the publisher's, and the images per step on a CPU and on a GPU."""

    ours: Callable[..., ConvNet]
    theirs: Callable[[str], nn.Module]
    name: str  # of the publisher's
    cpu: tuple[int, int]  # number of images and their side in pixels
    gpu: tuple[int, int]


TORCHVISION: Callable[[str], nn.Module] = torchvision.models.get_model
CONTESTS = {
    "resnet18": Contest(resnet, TORCHVISION, "resnet18", (16, 128), (256, 224)),
    "resnet50": Contest(resnet, TORCHVISION, "resnet50", (8, 128), (256, 224)),
    "mobilenet_v2": Contest(mobilenet, TORCHVISION, "mobilenet_v2", (16, 128), (256, 224)),
    "efficientnet_b0": Contest(efficientnet, TORCHVISION, "efficientnet_b0", (16, 128), (256, 224)),
    "convnext_tiny": Contest(convnext, TORCHVISION, "convnext_tiny", (4, 128), (256, 224)),
    "coatnet_0": Contest(
        coatnet, partial(timm.create_model, drop_path_rate=0.2), "coatnet_0_224", (2, 224), (128, 224)
    ),
}


class Trainee:
    """A network with its optimizer and the seconds of its rounds."""

    def __init__(self, net: nn.Module, device: torch.device) -> None:
        self.net = net.to(device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9)
        self.seconds: list[float] = []

    def run_round(self, images: Tensor, labels: Tensor, *, bfloat16: bool) -> None:
        """Take the steps of a round and record their seconds."""
        start = read_clock(images.device)
        for _ in range(STEPS):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
                loss = functional.cross_entropy(self.net(images), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.seconds.append(read_clock(images.device) - start)


def read_clock(device: torch.device) -> float:
    """Seconds of CPU time, or on the clock when the GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def compete(variant: str, contest: Contest, *, rounds: int, device: torch.device, bfloat16: bool) -> None:
    """Train both in turn; print their images per second and the ratio."""
    count, side = contest.cpu if device.type == "cpu" else contest.gpu
    images = torch.randn(count, 3, side, side, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (count,), device=device)
    ours = Trainee(contest.ours(variant, image_size=224), device)
    theirs = Trainee(contest.theirs(contest.name), device)
    for turn in range(rounds + WARMUP_ROUNDS):
        # The order alternates, so that a machine that warms up or slows down favours neither.
        for trainee in (ours, theirs) if turn % 2 else (theirs, ours):
            trainee.run_round(images, labels, bfloat16=bfloat16)
    our_seconds, their_seconds = (trainee.seconds[WARMUP_ROUNDS:] for trainee in (ours, theirs))
    ratio = statistics.median(b / a for a, b in zip(our_seconds, their_seconds, strict=True))
    speeds = [count * STEPS / statistics.median(seconds) for seconds in (our_seconds, their_seconds)]
    precision = "bfloat16" if bfloat16 else "float32"
    row = f"{variant:<17}{count:>5}{side:>6}  {precision:<11}{speeds[0]:>10.1f}{speeds[1]:>10.1f}{ratio:>8.3f}"
    print(row, flush=True)


def main() -> None:
    """Compare the given networks, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="variant", help=", ".join(CONTESTS))
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    if unknown := set(options.variants) - CONTESTS.keys():
        parser.error(f"{unknown.pop()} is not one of {', '.join(CONTESTS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precisions = (False, True) if choose_precision("auto", "auto") == "bf16-mixed" else (False,)
    unit = "images/s" if device.type == "cuda" else "images per second of CPU time"
    print(f"{'network':<17}{'batch':>5}{'side':>6}  {'precision':<11}{'ours':>10}{'theirs':>10}{'ratio':>8}   {unit}")
    for variant in options.variants or CONTESTS:
        for bfloat16 in precisions:
            torch.manual_seed(0)
            compete(variant, CONTESTS[variant], rounds=options.rounds, device=device, bfloat16=bfloat16)


if __name__ == "__main__":
    main()
