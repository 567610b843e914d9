"""Fresh networks as they are in training: norms with statistics of the images, blocks open."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.analysis.trace import in_evaluation
from models.layers import batch_norms

NEARLY_SHUT = 0.1  # a scale at which blocks that are shut begin at most


@contextmanager
def calibrated(net: nn.Module, images: Tensor) -> Iterator[None]:
    """Inside the block a fresh network takes images (N, C, H, W) as in training; after it, it is bit for bit as before.

    Statistics of fresh batch norms are 0 and 1 and fit no image. In one run in evaluation every norm takes on mean and
    variance, over all images and positions, of what comes to it; a norm that is used twice keeps the last. Other ranks
    are not asked. All images are run at once: give as few as memory allows and as many as a variance needs.

    Blocks that begin as the identity are opened, their last scale 1: shut, they would show the field of the shortcuts.
    They end in a norm that begins at 0 (Goyal et al. 2017, section 5.1) or in a layer scale that begins near it
    (Touvron et al. 2021, "Going deeper with image transformers", section 2.2): one number for all channels.
    """
    norms = batch_norms(net)
    statistics = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var) if tensor is not None]
    scales = [*_shut_scales(net)]
    before = [(tensor, tensor.detach().clone()) for tensor in (*statistics, *scales)]
    try:
        with torch.no_grad():
            for scale in scales:
                scale.fill_(1)
        if statistics:
            _run_taking_statistics(net, images, norms=norms)
        yield
    finally:
        with torch.no_grad():
            for tensor, numbers in before:
                tensor.copy_(numbers)


def is_fresh(net: nn.Module) -> bool:
    """Whether no batch norm has seen an image yet; a network without such norms is taken for fresh."""
    pairs = ((norm.running_mean, norm.running_var) for norm in batch_norms(net))
    return not any(
        mean is not None and variance is not None and bool(mean.any() or (variance != 1).any())
        for mean, variance in pairs
    )


def _shut_scales(net: nn.Module) -> Iterator[nn.Parameter]:
    """The scales of channels behind which nothing, or next to nothing, of a fresh block comes out."""
    for name, parameter in net.named_parameters():
        numbers = parameter.detach().flatten()
        along_one = sum(size > 1 for size in parameter.shape) <= 1 and "bias" not in name.rpartition(".")[2]
        if along_one and len(numbers) and bool(numbers[0].abs() <= NEARLY_SHUT) and bool((numbers == numbers[0]).all()):
            yield parameter


@torch.no_grad()
def _run_taking_statistics(net: nn.Module, images: Tensor, *, norms: Iterable[nn.Module]) -> None:
    def take(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        if norm.running_mean is not None and norm.running_var is not None:
            numbers = inputs[0].to(norm.running_mean.dtype)
            dims = [dim for dim in range(numbers.ndim) if dim != 1]
            variance, mean = torch.var_mean(numbers, dims, correction=0)  # (N, C, ...) -> (C,), as training divides by
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)

    like = next(net.parameters(), images)
    with ExitStack() as hooks, in_evaluation(net):
        for norm in norms:
            hooks.callback(norm.register_forward_pre_hook(take).remove)
        net(images.to(like.device, like.dtype))
