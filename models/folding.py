"""Batch norms as part of the convolutions before them, for inference."""

import torch
from torch import nn
from torch.fx.experimental import optimization

UNTRACEABLE = (ValueError, TypeError, RuntimeError, AttributeError)  # of torch.fx, by what a network does


def fold_batch_norms(net: nn.Module) -> nn.Module:
    """Return a copy without the batch norms that follow a convolution, which scales and shifts in their place.

    In evaluation mode it computes the same to rounding, up to twice as fast on a CPU. A network that torch.fx cannot
    trace, such as CoAtNet, is returned itself.
    """
    try:
        folded: nn.Module = optimization.fuse(net)
    except UNTRACEABLE:
        return net
    return folded.to(memory_format=torch.channels_last)
