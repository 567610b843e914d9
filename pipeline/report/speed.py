"""How fast networks are on this machine, one beside the other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn

ROUNDS = 3


@torch.inference_mode()
def images_per_second(
    nets: Sequence[nn.Module], shapes: Sequence[tuple[int, int, int]], *, batch_size: int
) -> list[float]:
    """Images a second of each network in evaluation, on batches of its own shape (C, H, W), in float32.

    All take their turn in every round, so that what else the machine does meets them alike; the median of the rounds.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = []
    for net, shape in zip(nets, shapes, strict=True):
        net.eval().to(device).to(memory_format=torch.channels_last)
        batches.append(torch.randn(batch_size, *shape, device=device).to(memory_format=torch.channels_last))
    for net, images in zip(nets, batches, strict=True):
        _seconds(net, images)
    rounds = [[_seconds(net, images) for net, images in zip(nets, batches, strict=True)] for _ in range(ROUNDS)]
    return [batch_size / statistics.median(seconds) for seconds in zip(*rounds, strict=True)]


def _seconds(net: nn.Module, images: torch.Tensor) -> float:
    began = time.perf_counter()
    net(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
