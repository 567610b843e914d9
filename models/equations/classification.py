"""Linear layer, softmax and cross-entropy: section 7 of the notes."""

import torch
from torch import Tensor

from models.equations.context import Context


def linear(z: Tensor, W_cls: Tensor, *, b_cls: Tensor | None = None) -> Tensor:
    """logits = z W_cls + b_cls; torch stores W_cls transposed. Shapes: (B, features), (features, C), (C,) -> (B, C)."""
    logits = z @ W_cls
    return logits if b_cls is None else logits + b_cls


def softmax(logits: Tensor) -> Tensor:
    """P(y=k|x) = e^logit_k / sum over j of e^logit_j, without overflow. Shapes: (B, C) -> (B, C), rows of sum 1."""
    powers = torch.exp(logits - logits.amax(1, keepdim=True))
    return powers / powers.sum(1, keepdim=True)


class CrossEntropy(torch.autograd.Function):
    """L = -logit_true + log sum over j of e^logit_j, averaged over the batch; inputs logits, labels.

    The gradient is (softmax - one-hot) / B. Shapes: (B, C), int64 (B,) -> ().
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
