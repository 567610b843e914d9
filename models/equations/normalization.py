"""Input normalization and batch norm: sections 2 and 5 of the notes."""

import torch
from torch import Tensor

from models.equations.context import Context


def normalize(pixels: Tensor, mu: Tensor, *, sigma: Tensor) -> Tensor:
    """X = (pixel - mu) / sigma, per channel, in units of 0 to 255. Shapes: uint8 (H, W, C), (C,), (C,) -> (H, W, C)."""
    return (pixels.to(torch.float32) - mu) / sigma


def statistics(X: Tensor) -> tuple[Tensor, Tensor]:
    """mu_c, sigma_c^2: mean and mean squared deviation over b, i, j. Shapes: (B, C, H, W) -> (C,), (C,)."""
    mu = X.mean((0, 2, 3))
    return mu, ((X - mu[:, None, None]) ** 2).mean((0, 2, 3))


def normalized(X: Tensor, mu: Tensor, *, variance: Tensor, eps: float) -> Tensor:
    """X_hat = (X - mu_c) / sqrt(sigma_c^2 + eps). Shapes: (B, C, H, W), (C,), (C,) -> (B, C, H, W)."""
    return (X - mu[:, None, None]) / torch.sqrt(variance + eps)[:, None, None]


def scaled(X_hat: Tensor, gamma: Tensor, *, beta: Tensor) -> Tensor:
    """Y = gamma_c X_hat + beta_c. Shapes: (B, C, H, W), (C,), (C,) -> (B, C, H, W)."""
    return gamma[:, None, None] * X_hat + beta[:, None, None]


class BatchNorm(torch.autograd.Function):
    """Batch norm with the batch's statistics; inputs X, gamma, beta, eps.

    The notes give no gradient. It flows through the mean and the variance too: with n = B H W,
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
    """`BatchNorm`, for training; in inference `scaled(normalized(X, ...), ...)` takes the moving averages."""
    Y: Tensor = BatchNorm.apply(X, gamma, beta, eps)
    return Y


def moving_averages(X: Tensor, mu: Tensor, *, variance: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    """Update the averages of mu_c and sigma_c^2 with a batch: (1 - momentum) old + momentum new.

    The notes leave open which variance is averaged. As in torch it is the unbiased one, n / (n - 1) of the one that
    normalizes, and `momentum` is the share of the new value.
    Shapes: (B, C, H, W), (C,), (C,) -> (C,), (C,). Raises: ValueError for one value per channel, which has no variance.
    """
    n = X.numel() // X.shape[1]
    if n == 1:
        raise ValueError(f"X has the shape {tuple(X.shape)}: batch norm trains on more than one value per channel")
    new_mu, biased = statistics(X)
    unbiased = biased * n / (n - 1)
    return (1 - momentum) * mu + momentum * new_mu, (1 - momentum) * variance + momentum * unbiased
