"""The speed of networks on this machine, measured side by side."""

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
    """Return images per second of each network in evaluation, on batches of its shape (C, H, W), in float32.

    The median of several rounds. The networks alternate, so that other load on the machine affects all of them alike.
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
