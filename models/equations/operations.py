"""The operations of a convolutional network, and their gradients, as the equations of the notes.

"Comprehensive Master Notes: CNN", sections 2 to 7. Nothing here calls what torch has for these layers; tensors are
added, multiplied, compared, cut and pasted, so that the equations can be read, and checked against torch's layers.
For training they are slow: `models.layers` and torch's own layers are what the networks are made of.

The names are the notes': B images, C channels, H and W rows and columns; X goes in, Y comes out, W are kernels, beta
biases or shifts, K the side of a kernel, S the stride, P the padding of each border, L the loss and delta_Y = dL/dY.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from models.equations.counts import convolution_shape, output_size


class Context(torch.autograd.function.FunctionCtx):
    """What a forward leaves to its backward: tensors, and constants under the notes' names."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    S: int
    P: int
    eps: float
    size: tuple[int, int]


# ---- Section 2: from pixels to tensors


def normalize(pixels: Tensor, mu: Tensor, *, sigma: Tensor) -> Tensor:
    """X = (pixel - mu) / sigma in float32; mu and sigma are those of each channel, in the pixels' units of 0 to 255.

    Shapes: uint8 (H, W, C), (C,), (C,) -> (H, W, C).
    """
    return (pixels.to(torch.float32) - mu) / sigma


# ---- Section 3: convolution


def pad(X: Tensor, P: int, *, value: float = 0.0) -> Tensor:
    """X_pad: X within a border of P zeros, or of another value.

    Shapes: (B, C, H, W) -> (B, C, H + 2P, W + 2P).
    """
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
        seen = X_pad[:, c : c + 1, u : u + S * H_out : S, v : v + S * W_out : S]  # [iS+u, jS+v] of all i, j
        Y = Y + W[:, c, u, v][:, None, None] * seen  # (C_out, 1, 1) * (B, 1, H_out, W_out)
    return Y if beta is None else Y + beta[:, None, None]


def patches(X_pad: Tensor, K: int, *, S: int) -> Tensor:
    """X_pad[b,c,iS+u,jS+v] as a view, [b,c,i,j,u,v]: what the kernel covers at each of its positions.

    Shapes: (B, C, H, W) -> (B, C, H_out, W_out, K, K).
    """
    return X_pad.unfold(2, K, S).unfold(3, K, S)


def im2col(X_pad: Tensor, K: int, *, S: int) -> Tensor:
    """The patches of all images unrolled, one a column. Shapes: (B, C, H, W) -> (C K K, B H_out W_out)."""
    return patches(X_pad, K, S=S).permute(1, 4, 5, 0, 2, 3).flatten(3).flatten(0, 2)


def convolution_im2col(X: Tensor, W: Tensor, *, beta: Tensor | None = None, S: int = 1, P: int = 0) -> Tensor:
    """The same convolution as one matrix product: kernels are the rows of one factor, patches the columns of the other.

    Shapes and errors: those of `convolution_sum`.
    """
    B, C_out, H_out, W_out = convolution_shape(X.shape, W.shape, S=S, P=P)
    product = W.flatten(1) @ im2col(pad(X, P), W.shape[-1], S=S)  # (C_out, C_in K K) @ (C_in K K, B H_out W_out)
    Y = product.view(C_out, B, H_out, W_out).transpose(0, 1)  # -> (B, C_out, H_out, W_out)
    return Y if beta is None else Y + beta[:, None, None]


def gradient_W(delta_Y: Tensor, X: Tensor, *, K: int, S: int = 1, P: int = 0) -> Tensor:
    """dL/dW[k,c,u,v] = sum over b, i, j of delta_Y[b,k,i,j] X_pad[b,c,iS+u,jS+v], a correlation.

    Shapes: (B, C_out, H_out, W_out), (B, C_in, H, W) -> (C_out, C_in, K, K).
    """
    C_out, C_in = delta_Y.shape[1], X.shape[1]
    rows = delta_Y.transpose(0, 1).flatten(1)  # (C_out, B H_out W_out)
    return (rows @ im2col(pad(X, P), K, S=S).T).view(C_out, C_in, K, K)


def gradient_X(delta_Y: Tensor, W: Tensor, *, size: tuple[int, int], S: int = 1, P: int = 0) -> Tensor:
    """dL/dX[b,c,p,q] = sum over k, u, v of delta_Y[b,k,p-u,q-v] W[k,c,u,v]: a full convolution with the kernel turned.

    That is S = 1 and P = 0. A stride puts S - 1 zeros between the elements of delta_Y; padding is where the
    result is cut off. `size` is (H, W) of X: rows and columns that no kernel reached have the gradient 0.

    Shapes: (B, C_out, H_out, W_out), (C_out, C_in, K, K) -> (B, C_in, H, W).
    """
    (B, C_out, H_out, W_out), K = delta_Y.shape, W.shape[-1]
    rows, columns = size
    first = K - 1  # a full convolution begins where the kernel reaches the first element with its last
    spread = delta_Y.new_zeros(B, C_out, rows + 2 * P + first, columns + 2 * P + first)
    spread[:, :, first : first + S * H_out : S, first : first + S * W_out : S] = delta_Y
    turned = W.flip(2, 3).transpose(0, 1)  # by 180 degrees, (C_in, C_out, K, K)
    delta_X_pad = convolution_im2col(spread, turned)  # (B, C_in, H + 2P, W + 2P)
    return delta_X_pad[:, :, P : P + rows, P : P + columns]


def gradient_beta(delta_Y: Tensor) -> Tensor:
    """dL/dbeta_k = sum over b, i, j of delta_Y[b,k,i,j]. Shapes: (B, C_out, H_out, W_out) -> (C_out,)."""
    return delta_Y.sum((0, 2, 3))


class Convolution(torch.autograd.Function):
    """`convolution_im2col` with these three gradients; inputs X, W, beta or None, S, P.

    Shapes: (B, C_in, H, W), (C_out, C_in, K, K), (C_out,) -> (B, C_out, H_out, W_out).
    """

    @staticmethod
    def forward(ctx: Context, *inputs: *tuple[Tensor, Tensor, Tensor | None, int, int]) -> Tensor:
        X, W, beta, ctx.S, ctx.P = inputs
        ctx.save_for_backward(X, W)
        return convolution_im2col(X, W, beta=beta, S=ctx.S, P=ctx.P)

    @staticmethod
    def backward(ctx: Context, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """dL/dX, dL/dW and dL/dbeta, as far as they are asked for."""
        (delta_Y,), (X, W), (S, P) = outputs, ctx.saved_tensors, (ctx.S, ctx.P)
        for_X, for_W, for_beta, *_ = ctx.needs_input_grad
        return (
            gradient_X(delta_Y, W, size=(X.shape[2], X.shape[3]), S=S, P=P) if for_X else None,
            gradient_W(delta_Y, X, K=W.shape[-1], S=S, P=P) if for_W else None,
            gradient_beta(delta_Y) if for_beta else None,
            *(None, None),
        )


def convolution(X: Tensor, W: Tensor, *, beta: Tensor | None = None, S: int = 1, P: int = 0) -> Tensor:
    """`Convolution`: one matrix product forward, the notes' three gradients backward.

    Shapes and errors: those of `convolution_sum`.
    """
    Y: Tensor = Convolution.apply(X, W, beta, S, P)
    return Y


# ---- Section 4: nonlinearity


class ReLU(torch.autograd.Function):
    """max(0, x), whose gradient is 1 where x > 0 and 0 where x <= 0; input X.

    Shapes: any -> the same.
    """

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


# ---- Section 5: normalization


def statistics(X: Tensor) -> tuple[Tensor, Tensor]:
    """mu_c and sigma_c^2 of each channel: the mean, and the mean square of what differs from it, over b, i, j.

    Shapes: (B, C, H, W) -> (C,), (C,).
    """
    mu = X.mean((0, 2, 3))
    return mu, ((X - mu[:, None, None]) ** 2).mean((0, 2, 3))


def normalized(X: Tensor, mu: Tensor, *, variance: Tensor, eps: float) -> Tensor:
    """X_hat = (X - mu_c) / sqrt(sigma_c^2 + eps). Shapes: (B, C, H, W), (C,), (C,) -> (B, C, H, W)."""
    return (X - mu[:, None, None]) / torch.sqrt(variance + eps)[:, None, None]


def scaled(X_hat: Tensor, gamma: Tensor, *, beta: Tensor) -> Tensor:
    """Y = gamma_c X_hat + beta_c. Shapes: (B, C, H, W), (C,), (C,) -> (B, C, H, W)."""
    return gamma[:, None, None] * X_hat + beta[:, None, None]


class BatchNorm(torch.autograd.Function):
    """Y of the batch's own statistics, through which the gradient flows too; inputs X, gamma, beta, eps.

    The notes give no gradient. With n = B H W and X_hat depending on X by its mean and its variance,
    dL/dX = gamma / sqrt(sigma^2 + eps) (delta_Y - dL/dbeta / n - X_hat dL/dgamma / n).

    Shapes: (B, C, H, W), (C,), (C,) -> (B, C, H, W).
    """

    @staticmethod
    def forward(ctx: Context, *inputs: *tuple[Tensor, Tensor, Tensor, float]) -> Tensor:
        X, gamma, beta, ctx.eps = inputs
        ctx.save_for_backward(X, gamma)
        mu, variance = statistics(X)
        return scaled(normalized(X, mu, variance=variance, eps=ctx.eps), gamma, beta=beta)

    @staticmethod
    def backward(ctx: Context, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """dL/dX, dL/dgamma and dL/dbeta."""
        (delta_Y,), (X, gamma) = outputs, ctx.saved_tensors
        mu, variance = statistics(X)
        X_hat = normalized(X, mu, variance=variance, eps=ctx.eps)
        delta_gamma, delta_beta = (delta_Y * X_hat).sum((0, 2, 3)), delta_Y.sum((0, 2, 3))
        n = X.numel() // X.shape[1]
        inner = delta_Y - scaled(X_hat, delta_gamma / n, beta=delta_beta / n)
        return (gamma / torch.sqrt(variance + ctx.eps))[:, None, None] * inner, delta_gamma, delta_beta, None


def batch_norm(X: Tensor, gamma: Tensor, *, beta: Tensor, eps: float = 1e-5) -> Tensor:
    """`BatchNorm`, in training. At inference it is `scaled(normalized(X, ...), ...)` of the moving averages.

    Shapes: (B, C, H, W), (C,), (C,) -> (B, C, H, W).
    """
    Y: Tensor = BatchNorm.apply(X, gamma, beta, eps)
    return Y


def moving_averages(X: Tensor, mu: Tensor, *, variance: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    """The averages of mu_c and sigma_c^2 with this batch's in them: (1 - momentum) old + momentum new.

    The notes leave open which variance is averaged; torch averages the unbiased one, n / (n - 1) of that which
    normalizes, and counts `momentum` as the share of the new.

    Shapes: (B, C, H, W), (C,), (C,) -> (C,), (C,).
    Raises: ValueError for one value a channel, which has no variance.
    """
    n = X.numel() // X.shape[1]
    if n == 1:
        raise ValueError(f"X has the shape {tuple(X.shape)}: batch norm trains on more than one value per channel")
    new_mu, biased = statistics(X)
    unbiased = biased * n / (n - 1)
    return (1 - momentum) * mu + momentum * new_mu, (1 - momentum) * variance + momentum * unbiased


# ---- Section 6: downsampling and efficiency


class MaxPooling(torch.autograd.Function):
    """Y[b,c,i,j] = max over u, v of X[b,c,iS+u,jS+v]; inputs X, K, S, P.

    The gradient goes to the maximum; of several equal ones, to the first by rows, as in torch. Padding, which
    the notes' equation lacks, is -inf and never a maximum.

    Shapes: (B, C, H, W) -> (B, C, H_out, W_out).
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
        """dL/dX: delta_Y summed where the maxima were."""
        (delta_Y,), (place,) = outputs, ctx.saved_tensors
        (B, C), (rows, columns), P = delta_Y.shape[:2], ctx.size, ctx.P
        flat = delta_Y.new_zeros(B, C, (rows + 2 * P) * (columns + 2 * P))
        flat = flat.scatter_add(2, place.flatten(2), delta_Y.flatten(2))
        delta_X_pad = flat.view(B, C, rows + 2 * P, columns + 2 * P)
        return delta_X_pad[:, :, P : P + rows, P : P + columns], None, None, None


def max_pool(X: Tensor, K: int, *, S: int, P: int = 0) -> Tensor:
    """`MaxPooling`.

    Shapes: (B, C, H, W) -> (B, C, H_out, W_out).
    Raises: ValueError for a window that lies all in the padding, or is larger than the padded input.
    """
    if 2 * P > K:
        raise ValueError(f"P={P} must be at most half of K={K}: else a window would see no pixel")
    output_size(min(X.shape[2:]), K, S=S, P=P)
    Y: Tensor = MaxPooling.apply(X, K, S, P)
    return Y


def depthwise(X: Tensor, W: Tensor, *, beta: Tensor | None = None, S: int = 1, P: int = 0) -> Tensor:
    """One K x K filter a channel: Y[b,c,i,j] = beta_c + sum over u, v of W[c,0,u,v] X_pad[b,c,iS+u,jS+v].

    Shapes: (B, C, H, W), (C, 1, K, K), (C,) -> (B, C, H_out, W_out).
    Raises: ValueError for another number of filters.
    """
    if W.shape[:2] != (X.shape[1], 1):
        raise ValueError(f"W has the shape {tuple(W.shape)}: {X.shape[1]} channels take ({X.shape[1]}, 1, K, K)")
    Y = (patches(pad(X, P), W.shape[-1], S=S) * W[:, :, None]).sum((4, 5))  # * (C, 1, 1, K, K)
    return Y if beta is None else Y + beta[:, None, None]


def pointwise(X: Tensor, W: Tensor, *, beta: Tensor | None = None) -> Tensor:
    """A 1x1 convolution, which is a matrix product over the channels of each pixel.

    Shapes: (B, C_in, H, W), (C_out, C_in), (C_out,) -> (B, C_out, H, W).
    """
    Y = (W @ X.flatten(2)).view(len(X), len(W), *X.shape[2:])  # (C_out, C_in) @ (B, C_in, H W)
    return Y if beta is None else Y + beta[:, None, None]


# ---- Section 7: classifier head


def global_average_pool(X: Tensor) -> Tensor:
    """z[b,c] = 1 / (H W) sum over i, j of X[b,c,i,j]. Shapes: (B, C, H, W) -> (B, C)."""
    return X.sum((2, 3)) / (X.shape[2] * X.shape[3])


def linear(z: Tensor, W_cls: Tensor, *, b_cls: Tensor | None = None) -> Tensor:
    """logits = z W_cls + b_cls. W_cls is (features, C) in the notes; torch keeps its transpose, (C, features).

    Shapes: (B, features), (features, C), (C,) -> (B, C), C classes.
    """
    logits = z @ W_cls
    return logits if b_cls is None else logits + b_cls


def softmax(logits: Tensor) -> Tensor:
    """P(y=k|x) = e^logit_k / sum over j of e^logit_j; the largest is subtracted first, lest e^logit overflow.

    Shapes: (B, C) -> (B, C), rows of sum 1.
    """
    powers = torch.exp(logits - logits.amax(1, keepdim=True))
    return powers / powers.sum(1, keepdim=True)


class CrossEntropy(torch.autograd.Function):
    """L = -logit_true + log sum over j of e^logit_j, the mean over the batch; inputs logits, labels.

    Its gradient is (softmax - one-hot) / B.

    Shapes: (B, C), int64 (B,) -> ().
    """

    @staticmethod
    def forward(ctx: Context, *inputs: *tuple[Tensor, Tensor]) -> Tensor:
        logits, labels = inputs
        ctx.save_for_backward(logits, labels)
        largest = logits.amax(1)
        log_sum_exp = largest + torch.log(torch.exp(logits - largest[:, None]).sum(1))  # (B,)
        return (log_sum_exp - logits.gather(1, labels[:, None])[:, 0]).mean()

    @staticmethod
    def backward(ctx: Context, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """dL/dlogits."""
        (delta_L,), (logits, labels) = outputs, ctx.saved_tensors
        one_hot = labels[:, None] == torch.arange(logits.shape[1], device=logits.device)  # (B, C)
        return delta_L * (softmax(logits) - one_hot.to(logits.dtype)) / len(logits), None


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """`CrossEntropy`. Shapes: (B, C), int64 (B,) -> ()."""
    L: Tensor = CrossEntropy.apply(logits, labels)
    return L
