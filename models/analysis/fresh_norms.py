"""Fresh networks as they are in training: norms with the statistics of images, residual blocks active."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.analysis.trace import in_mode
from models.layers import batch_norms

IDENTITY_SCALE = 0.1  # the largest initial scale with which a block counts as the identity


@contextmanager
def estimated_norms(net: nn.Module, images: Tensor) -> Iterator[None]:
    """Prepare a fresh network for images (N, C, H, W) inside the block, and restore it bit for bit after it.

    One forward in evaluation mode sets batch norms to the statistics of their input; one that is used twice keeps the
    last. Blocks that start as the identity get a last scale of 1, else only their shortcuts would be measured. They end
    in a norm that starts at 0 (Goyal et al. 2017, section 5.1) or in a layer scale that starts near it (Touvron et al.
    2021, "Going deeper with image transformers", section 2.2), recognised by one small value for all channels.
    """
    norms, scales = batch_norms(net), [*_identity_scales(net)]
    statistics = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var) if tensor is not None]
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
        is_vector = len(values) > 0 and sum(size > 1 for size in parameter.shape) <= 1
        is_scale = is_vector and "bias" not in name.rpartition(".")[2]
        if is_scale and values[0].abs() <= IDENTITY_SCALE and (values == values[0]).all():
            yield parameter


@torch.no_grad()
def _estimate_statistics(net: nn.Module, images: Tensor, *, norms: Iterable[nn.Module]) -> None:
    def estimate(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        if norm.running_mean is not None and norm.running_var is not None:
            values = inputs[0].to(norm.running_mean.dtype)
            dims = [0, *range(2, values.ndim)]
            variance, mean = torch.var_mean(values, dims, correction=0)  # (N, C, ...) -> (C,); biased, as in training
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)

    like = next(net.parameters(), images)
    with ExitStack() as hooks, in_mode(net, training=False):
        for norm in norms:
            hooks.callback(norm.register_forward_pre_hook(estimate).remove)
        net(images.to(like.device, like.dtype))
