"""Batch norms as part of the convolutions before them, for inference."""

from collections import Counter

import torch
from torch import fx, nn
from torch.fx.experimental import optimization

# Exceptions of torch.fx, by what a network does.
UNTRACEABLE = (ValueError, TypeError, RuntimeError, AttributeError, LookupError, AssertionError, NameError)


def fold_batch_norms(net: nn.Module) -> nn.Module:
    """Return a copy without the batch norms that follow a convolution, which scales and shifts in their place.

    In evaluation mode it computes the same to rounding, up to twice as fast on a CPU. A network that torch.fx cannot
    trace, such as CoAtNet, that calls a module twice, or that has hooks, is returned itself.
    """
    try:
        calls = Counter(str(node.target) for node in fx.symbolic_trace(net).graph.nodes if node.op == "call_module")
        has_hooks = any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
        if has_hooks or any(count > 1 for count in calls.values()):
            return net
        folded: nn.Module = optimization.fuse(net)
    except UNTRACEABLE:
        return net
    return folded.to(memory_format=torch.channels_last)
