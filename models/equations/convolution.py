"""Convolutions and their gradients: sections 3 and 6 of the notes."""

import itertools

import torch
from torch import Tensor

from models.equations.context import Context
from models.equations.counts import convolution_shape


def pad(X: Tensor, P: int, *, value: float = 0.0) -> Tensor:
    """X_pad: X within a border of P zeros, or of another value. Shapes: (B, C, H, W) -> (B, C, H + 2P, W + 2P)."""
    B, C, rows, columns = X.shape
    X_pad = X.new_full((B, C, rows + 2 * P, columns + 2 * P), value)
    X_pad[:, :, P : P + rows, P : P + columns] = X
    return X_pad


def convolution_sum(X: Tensor, W: Tensor, *, beta: Tensor | None = None, S: int = 1, P: int = 0) -> Tensor:
    """Y[b,k,i,j] = beta_k + sum over c, u, v of W[k,c,u,v] X_pad[b,c,iS+u,jS+v], term by term.

    Shapes: (B, C_in, H, W), (C_out, C_in, K, K), (C_out,) -> (B, C_out, H_out, W_out).
    Raises: ValueError for kernels of another shape, or larger than the padded input.
    """
    B, C_out, H_out, W_out = convolution_shape(X.shape, W.shape, S=S, P=P)
    _, C_in, K, _ = W.shape
    X_pad = pad(X, P)
    Y = X.new_zeros(B, C_out, H_out, W_out)
    for c, u, v in itertools.product(range(C_in), range(K), range(K)):
        taps = X_pad[:, c : c + 1, u : u + S * H_out : S, v : v + S * W_out : S]  # [iS+u, jS+v] of all i, j
        Y = Y + W[:, c, u, v][:, None, None] * taps  # (C_out, 1, 1) * (B, 1, H_out, W_out)
    return Y if beta is None else Y + beta[:, None, None]


def patches(X_pad: Tensor, K: int, *, S: int) -> Tensor:
    """X_pad[b,c,iS+u,jS+v] as a view [b,c,i,j,u,v]. Shapes: (B, C, H, W) -> (B, C, H_out, W_out, K, K)."""
    return X_pad.unfold(2, K, S).unfold(3, K, S)


def im2col(X_pad: Tensor, K: int, *, S: int) -> Tensor:
    """The patches of all images, one per column. Shapes: (B, C, H, W) -> (C K K, B H_out W_out)."""
    return patches(X_pad, K, S=S).permute(1, 4, 5, 0, 2, 3).flatten(3).flatten(0, 2)


def convolution_im2col(X: Tensor, W: Tensor, *, beta: Tensor | None = None, S: int = 1, P: int = 0) -> Tensor:
    """`convolution_sum` as a product of a matrix with a kernel per row and one with a patch per column."""
    B, C_out, H_out, W_out = convolution_shape(X.shape, W.shape, S=S, P=P)
    product = W.flatten(1) @ im2col(pad(X, P), W.shape[-1], S=S)  # (C_out, C_in K K) @ (C_in K K, B H_out W_out)
    Y = product.view(C_out, B, H_out, W_out).transpose(0, 1)  # -> (B, C_out, H_out, W_out)
    return Y if beta is None else Y + beta[:, None, None]


def gradient_W(delta_Y: Tensor, X: Tensor, *, K: int, S: int = 1, P: int = 0) -> Tensor:
    """dL/dW[k,c,u,v] = sum over b, i, j of delta_Y[b,k,i,j] X_pad[b,c,iS+u,jS+v], of shape (C_out, C_in, K, K)."""
    C_out, C_in = delta_Y.shape[1], X.shape[1]
    rows = delta_Y.transpose(0, 1).flatten(1)  # (C_out, B H_out W_out)
    return (rows @ im2col(pad(X, P), K, S=S).T).view(C_out, C_in, K, K)


def gradient_X(delta_Y: Tensor, W: Tensor, *, size: tuple[int, int], S: int = 1, P: int = 0) -> Tensor:
    """dL/dX[b,c,p,q] = sum over k, u, v of delta_Y[b,k,p-u,q-v] W[k,c,u,v]: a full convolution with the rotated kernel.

    The equation is for S = 1 and P = 0. A stride puts S - 1 zeros between the elements of delta_Y; padding is cut off
    the result. `size` is (H, W) of X: rows and columns that no kernel reached have the gradient 0.
    Shapes: (B, C_out, H_out, W_out), (C_out, C_in, K, K) -> (B, C_in, H, W).
    """
    (B, C_out, H_out, W_out), K = delta_Y.shape, W.shape[-1]
    rows, columns = size
    first = K - 1  # a full convolution starts where the last element of the kernel meets the first of delta_Y
    spread = delta_Y.new_zeros(B, C_out, rows + 2 * P + first, columns + 2 * P + first)
    spread[:, :, first : first + S * H_out : S, first : first + S * W_out : S] = delta_Y
    rotated = W.flip(2, 3).transpose(0, 1)  # by 180 degrees, (C_in, C_out, K, K)
    delta_X_pad = convolution_im2col(spread, rotated)  # (B, C_in, H + 2P, W + 2P)
    return delta_X_pad[:, :, P : P + rows, P : P + columns]


def gradient_beta(delta_Y: Tensor) -> Tensor:
    """dL/dbeta_k = sum over b, i, j of delta_Y[b,k,i,j]. Shapes: (B, C_out, H_out, W_out) -> (C_out,)."""
    return delta_Y.sum((0, 2, 3))


class Convolution(torch.autograd.Function):
    """`convolution_im2col` with these gradients; inputs X, W, beta or None, S, P. Shapes: as there, X, W, beta -> Y."""

    @staticmethod
    def forward(ctx: Context, *inputs: *tuple[Tensor, Tensor, Tensor | None, int, int]) -> Tensor:
        X, W, beta, ctx.S, ctx.P = inputs
        ctx.save_for_backward(X, W)
        return convolution_im2col(X, W, beta=beta, S=ctx.S, P=ctx.P)

    @staticmethod
    def backward(ctx: Context, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """dL/dX, dL/dW and dL/dbeta, as far as they are needed."""
        (delta_Y,), (X, W), (S, P) = outputs, ctx.saved_tensors, (ctx.S, ctx.P)
        for_X, for_W, for_beta, *_ = ctx.needs_input_grad
        return (
            gradient_X(delta_Y, W, size=(X.shape[2], X.shape[3]), S=S, P=P) if for_X else None,
            gradient_W(delta_Y, X, K=W.shape[-1], S=S, P=P) if for_W else None,
            gradient_beta(delta_Y) if for_beta else None,
            *(None, None),
        )


def convolution(X: Tensor, W: Tensor, *, beta: Tensor | None = None, S: int = 1, P: int = 0) -> Tensor:
    """`Convolution`: one matrix product forward, three gradients backward. Shapes and errors: `convolution_sum`'s."""
    Y: Tensor = Convolution.apply(X, W, beta, S, P)
    return Y


def depthwise(X: Tensor, W: Tensor, *, beta: Tensor | None = None, S: int = 1, P: int = 0) -> Tensor:
    """One K x K filter per channel: Y[b,c,i,j] = beta_c + sum over u, v of W[c,0,u,v] X_pad[b,c,iS+u,jS+v].

    Shapes: (B, C, H, W), (C, 1, K, K), (C,) -> (B, C, H_out, W_out). Raises: ValueError for another number of filters.
    """
    if W.shape[:2] != (X.shape[1], 1):
        raise ValueError(f"W has the shape {tuple(W.shape)}: {X.shape[1]} channels take ({X.shape[1]}, 1, K, K)")
    Y = (patches(pad(X, P), W.shape[-1], S=S) * W[:, :, None]).sum((4, 5))  # * (C, 1, 1, K, K)
    return Y if beta is None else Y + beta[:, None, None]


def pointwise(X: Tensor, W: Tensor, *, beta: Tensor | None = None) -> Tensor:
    """A 1x1 convolution. Shapes: (B, C_in, H, W), (C_out, C_in), (C_out,) -> (B, C_out, H, W)."""
    Y = (W @ X.flatten(2)).view(len(X), len(W), *X.shape[2:])  # (C_out, C_in) @ (B, C_in, H W)
    return Y if beta is None else Y + beta[:, None, None]
