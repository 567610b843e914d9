"""The context that a forward pass leaves to its backward pass, with the notes' constants."""

import torch
from torch import Tensor


class Context(torch.autograd.function.FunctionCtx):
    """Saved tensors, and constants under the notes' names."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    S: int
    P: int
    eps: float
    size: tuple[int, int]
