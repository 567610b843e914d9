"""ReLU and its gradient: section 4 of the notes."""

import torch
from torch import Tensor

from models.equations.context import Context


class ReLU(torch.autograd.Function):
    """max(0, x), with gradient 1 for x > 0 and 0 for x <= 0; input X. Shapes: any -> the same."""

    @staticmethod
    def forward(ctx: Context, *inputs: *tuple[Tensor]) -> Tensor:
        (X,) = inputs
        ctx.save_for_backward(X)
        return torch.maximum(X, X.new_zeros(()))

    @staticmethod
    def backward(ctx: Context, *outputs: Tensor) -> Tensor:
        """dL/dX."""
        (delta_Y,), (X,) = outputs, ctx.saved_tensors
        return torch.where(X > 0, delta_Y, 0)


def relu(X: Tensor) -> Tensor:
    """`ReLU`. Shapes: any -> the same."""
    Y: Tensor = ReLU.apply(X)
    return Y
