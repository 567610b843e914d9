"""Max pooling and global average pooling: sections 6 and 7 of the notes."""

import torch
from torch import Tensor

from models.equations.context import Context
from models.equations.convolution import pad, patches
from models.equations.counts import output_size


class MaxPooling(torch.autograd.Function):
    """Y[b,c,i,j] = max over u, v of X[b,c,iS+u,jS+v]; inputs X, K, S, P.

    The gradient goes to the maximum, of equal ones to the first by rows, as in torch. Padding, which is not in the
    notes, is -inf and never a maximum. Shapes: (B, C, H, W) -> (B, C, H_out, W_out).
    """

    @staticmethod
    def forward(ctx: Context, *inputs: *tuple[Tensor, int, int, int]) -> Tensor:
        X, K, S, P = inputs
        X_pad = pad(X, P, value=-torch.inf)
        Y, tap = patches(X_pad, K, S=S).flatten(4).max(4)  # (B, C, H_out, W_out), tap = u K + v
        i = torch.arange(Y.shape[2], device=X.device)[:, None]
        j = torch.arange(Y.shape[3], device=X.device)
        row, column = i * S + tap // K, j * S + tap % K  # in X_pad
        ctx.save_for_backward(row * X_pad.shape[3] + column)
        ctx.P, ctx.size = P, (X.shape[2], X.shape[3])
        return Y

    @staticmethod
    def backward(ctx: Context, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """dL/dX: delta_Y summed at the positions of the maxima."""
        (delta_Y,), (place,) = outputs, ctx.saved_tensors
        (B, C), (rows, columns), P = delta_Y.shape[:2], ctx.size, ctx.P
        flat = delta_Y.new_zeros(B, C, (rows + 2 * P) * (columns + 2 * P))
        flat = flat.scatter_add(2, place.flatten(2), delta_Y.flatten(2))
        delta_X_pad = flat.view(B, C, rows + 2 * P, columns + 2 * P)
        return delta_X_pad[:, :, P : P + rows, P : P + columns], None, None, None


def max_pool(X: Tensor, K: int, *, S: int, P: int = 0) -> Tensor:
    """`MaxPooling`. Raises: ValueError for a kernel that fits into the padding, or is larger than the padded input."""
    if 2 * P > K:
        raise ValueError(f"P={P} must be at most half of K={K}: else a kernel would cover padding alone")
    output_size(min(X.shape[2:]), K, S=S, P=P)
    Y: Tensor = MaxPooling.apply(X, K, S, P)
    return Y


def global_average_pool(X: Tensor) -> Tensor:
    """z[b,c] = 1 / (H W) sum over i, j of X[b,c,i,j]. Shapes: (B, C, H, W) -> (B, C)."""
    return X.sum((2, 3)) / (X.shape[2] * X.shape[3])
