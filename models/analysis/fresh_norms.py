"""Fresh networks as they are in training: norms with the statistics of images, residual blocks active."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.analysis.trace import evaluation_mode
from models.layers import batch_norms

IDENTITY_SCALE = 0.1  # the largest initial scale with which a block counts as the identity


@contextmanager
def estimated_norms(net: nn.Module, images: Tensor) -> Iterator[None]:
    """Prepare a fresh network for images (N, C, H, W) inside the block, and restore it bit for bit after it.

    Fresh batch norms have mean 0 and variance 1, which match no image. One forward in evaluation mode sets them to the
    mean and variance of their input over all images and positions; a norm that is used twice keeps the last. Other
    ranks do not take part. All images run at once.

    Blocks that start as the identity get a last scale of 1; otherwise only their shortcuts would be measured. They end
    in a norm that starts at 0 (Goyal et al. 2017, section 5.1) or in a layer scale that starts near it (Touvron et al.
    2021, "Going deeper with image transformers", section 2.2), recognised by one small value for all channels.
    """
    norms = batch_norms(net)
    statistics = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var) if tensor is not None]
    scales = [*_identity_scales(net)]
    before = [(tensor, tensor.detach().clone()) for tensor in (*statistics, *scales)]
    try:
        with torch.no_grad():
            for scale in scales:
                scale.fill_(1)
        if statistics:
            _estimate_statistics(net, images, norms=norms)
        yield
    finally:
        with torch.no_grad():
            for tensor, values in before:
                tensor.copy_(values)


def is_fresh(net: nn.Module) -> bool:
    """Whether all batch norms have their initial statistics; true for a network without any."""
    for norm in batch_norms(net):
        mean, variance = norm.running_mean, norm.running_var
        if mean is not None and variance is not None and bool(mean.any() or (variance != 1).any()):
            return False
    return True


def _identity_scales(net: nn.Module) -> Iterator[nn.Parameter]:
    """The scales of channels that nearly remove a fresh block's output."""
    for name, parameter in net.named_parameters():
        values = parameter.detach().flatten()
        is_vector = sum(size > 1 for size in parameter.shape) <= 1
        if not is_vector or not len(values) or "bias" in name.rpartition(".")[2]:
            continue
        if bool(values[0].abs() <= IDENTITY_SCALE) and bool((values == values[0]).all()):
            yield parameter


@torch.no_grad()
def _estimate_statistics(net: nn.Module, images: Tensor, *, norms: Iterable[nn.Module]) -> None:
    """Set the running statistics of norms to those of their inputs in one forward."""

    def estimate(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        if norm.running_mean is not None and norm.running_var is not None:
            values = inputs[0].to(norm.running_mean.dtype)
            dims = [dim for dim in range(values.ndim) if dim != 1]
            variance, mean = torch.var_mean(values, dims, correction=0)  # (N, C, ...) -> (C,); biased, as in training
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)

    like = next(net.parameters(), images)
    with ExitStack() as hooks, evaluation_mode(net):
        for norm in norms:
            hooks.callback(norm.register_forward_pre_hook(estimate).remove)
        net(images.to(like.device, like.dtype))
