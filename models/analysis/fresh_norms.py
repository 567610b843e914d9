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
    statistics = {norm: _Statistics() for norm in batch_norms(net) if norm.running_mean is not None}
    like, num_images = next(net.parameters(), None), 0
    with ExitStack() as hooks, in_mode(net, training=False):
        for norm, counted in statistics.items():
            hooks.callback(norm.register_forward_pre_hook(counted.count).remove)
        for images in batches:
            net(images if like is None else images.to(like.device, like.dtype))
            num_images += len(images)
    for norm, counted in statistics.items():
        counted.write(norm)
    return num_images


class _Statistics:
    """Mean and variance of the input of a norm: Chan, Golub & LeVeque 1979, for batches of any size."""

    def __init__(self) -> None:
        self.mean = self.variance = torch.zeros(())  # (C,) float64 after the first batch
        self.values = 0  # of each channel

    def count(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Count a batch (N, C, ...), and let the norm use its statistics."""
        assert isinstance(norm, _BatchNorm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        values = inputs[0].to(norm.running_mean.dtype)
        dims = [0, *range(2, values.ndim)]
        variance, mean = torch.var_mean(values, dims, correction=0)  # (N, C, ...) -> (C,); biased, as in training
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        share = (num_values := values.numel() // len(mean)) / (self.values + num_values)
        distance = mean.double() - self.mean.to(mean.device)
        self.variance = torch.lerp(self.variance.to(distance), variance.double(), share)
        self.variance += share * (1 - share) * distance.square()
        self.mean = self.mean.to(distance) + share * distance
        self.values += num_values

    def write(self, norm: _BatchNorm) -> None:
        """Give the norm what was counted, if anything was."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        if self.values:
            norm.running_mean.copy_(self.mean)
            norm.running_var.copy_(self.variance)


def _identity_scales(net: nn.Module) -> Iterator[nn.Parameter]:
    """The scales of channels that nearly remove a fresh block's output."""
    for name, parameter in net.named_parameters():
        values = parameter.detach().flatten()
        is_vector = len(values) > 0 and sum(size > 1 for size in parameter.shape) <= 1
        is_scale = is_vector and "bias" not in name.rpartition(".")[2]
        if is_scale and values[0].abs() <= IDENTITY_SCALE and (values == values[0]).all():
            yield parameter
