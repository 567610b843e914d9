"""Batch norms with the statistics of images: of fresh networks as they are in training, and of averaged weights."""

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

    Batch norms get the statistics of their input. Blocks that start as the identity get a last scale of 1, else only
    their shortcuts would be measured. They end in a norm that starts at 0 (Goyal et al. 2017, section 5.1) or in a
    layer scale that starts near it (Touvron et al. 2021, "Going deeper with image transformers", section 2.2),
    recognised by one small value for all channels.
    """
    norms, scales = batch_norms(net), [*_identity_scales(net)]
    statistics = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var) if tensor is not None]
    before = [(tensor, tensor.detach().clone()) for tensor in (*statistics, *scales)]
    try:
        with torch.no_grad():
            for scale in scales:
                scale.fill_(1)
        if statistics:
            estimate_norms(net, [images])
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


@torch.no_grad()
def estimate_norms(net: nn.Module, batches: Iterable[Tensor]) -> int:
    """Set batch norms to mean and variance of their input over batches (N, C, H, W); return the number of images.

    As in a training, each batch is normalised by its own statistics; as in an evaluation, dropout and stochastic depth
    are off. The variance is that of all values together (Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section
    3), while torch's `update_bn` averages those of the batches. A norm that is used twice counts both inputs.
    """
    statistics = [_InputStatistics(norm) for norm in batch_norms(net) if norm.running_mean is not None]
    like, num_images = next(net.parameters(), None), 0
    with ExitStack() as hooks, in_mode(net, training=False):
        for one in statistics:
            hooks.callback(one.norm.register_forward_pre_hook(one.count).remove)
        for images in batches:
            net(images if like is None else images.to(like.device, like.dtype))
            num_images += len(images)
    for one in statistics:
        one.write()
    return num_images


class _InputStatistics:
    """Mean and variance of the input of a norm, over batches of any size: Chan, Golub & LeVeque 1979."""

    def __init__(self, norm: _BatchNorm) -> None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.norm, self.running_mean, self.running_var = norm, norm.running_mean, norm.running_var
        self.mean = torch.zeros_like(norm.running_mean, dtype=torch.float64)  # (C,)
        self.variance = torch.zeros_like(self.mean)  # (C,)
        self.num_values = 0  # of each channel

    def count(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Count a batch (N, C, ...), and let the norm use the statistics of this batch."""
        values = inputs[0].to(self.running_mean.dtype)
        dims = [0, *range(2, values.ndim)]
        variance, mean = torch.var_mean(values, dims, correction=0)  # (N, C, ...) -> (C,); biased, as in training
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)
        num_values = values.numel() // len(mean)
        self.num_values += num_values
        share, distance = num_values / self.num_values, mean.double() - self.mean
        self.variance.lerp_(variance.double(), share).add_(distance.square(), alpha=share * (1 - share))
        self.mean.add_(distance, alpha=share)

    def write(self) -> None:
        """Give the norm what was counted, if anything was."""
        if self.num_values:
            self.running_mean.copy_(self.mean)
            self.running_var.copy_(self.variance)


def _identity_scales(net: nn.Module) -> Iterator[nn.Parameter]:
    """The scales of channels that nearly remove a fresh block's output."""
    for name, parameter in net.named_parameters():
        values = parameter.detach().flatten()
        is_vector = len(values) > 0 and sum(size > 1 for size in parameter.shape) <= 1
        is_scale = is_vector and "bias" not in name.rpartition(".")[2]
        if is_scale and values[0].abs() <= IDENTITY_SCALE and (values == values[0]).all():
            yield parameter
