"""What a network costs: parameters, multiply-adds, and the memory that training it takes.

Multiply-adds are those of convolutions, linear layers and the products of attention, as torch's own flop counter has
them, two flops each; norms, activations, poolings and biases are not counted, nor what weights alone are made into.
They are not time. Memory is counted in bytes of tensors, without the workspace of kernels and what an allocator rounds
up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import flop_registry

from models.analysis.trace import RAISED, Operation, Untraceable, memory_of, stand_ins, why

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]  # of groups of parameters


class Precision(NamedTuple):
    """In what weights are stored, and in what a network computes where it may."""

    stored: torch.dtype
    computed: torch.dtype


# By Lightning's names.
PRECISIONS = {
    "32-true": Precision(torch.float32, torch.float32),
    "bf16-mixed": Precision(torch.float32, torch.bfloat16),
    "16-mixed": Precision(torch.float32, torch.float16),
    "bf16-true": Precision(torch.bfloat16, torch.bfloat16),
    "16-true": Precision(torch.float16, torch.float16),
    "64-true": Precision(torch.float64, torch.float64),
}


class Memory(NamedTuple):
    """Bytes of a training step: what stays, and what the forward keeps for the backward of one batch."""

    weights: int  # and the running statistics
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def multiply_adds(operation: Operation) -> int:
    """Of one operation, by torch's rules; 0 for one that torch does not count."""
    count = flop_registry.get(operation.function._overloadpacket)
    if count is None:
        return 0
    return int(count(*operation.args, **operation.kwargs, out_val=operation.outputs[0])) // 2


def cost_of_separating(kernel_size: tuple[int, int], out_channels: int) -> Fraction:
    """What a depthwise and a pointwise convolution cost of the standard one: 1 / C_out + 1 / K^2, K^2 its pixels.

    Howard et al. 2017, section 3.1.
    """
    return Fraction(1, out_channels) + Fraction(1, math.prod(kernel_size))


def training_memory(
    net: nn.Module, shape: tuple[int, int, int, int], *, precision: str, optimizer: MakeOptimizer
) -> Memory:
    """What training on batches of this shape, (N, C, H, W), takes.

    Raises: ValueError for a precision that is none of PRECISIONS.
    """
    activations, stored = kept_for_backward(net, shape, precision=precision), PRECISIONS[precision].stored
    gradients = _bytes((parameter for parameter in net.parameters() if parameter.requires_grad), stored)
    return Memory(
        weights=_bytes([*net.parameters(), *net.buffers()], stored),
        gradients=gradients,
        optimizer=round(gradients * state_per_weight(optimizer)),
        activations=activations,
    )


def kept_for_backward(net: nn.Module, shape: tuple[int, int, int, int], *, precision: str) -> int:
    """Bytes that autograd keeps from the forward of a batch in training, each piece of memory once; no weights.

    Counted where it happens, on tensors without memory, and without the images themselves. Weights and images that are
    cast for a mixed precision are counted, as autocast on a CPU casts them: they are kept too.

    Raises: ValueError for a precision that is none of PRECISIONS, Untraceable for a network that needs numbers.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision} is not one of {', '.join(PRECISIONS)}")
    stored, computed = PRECISIONS[precision]
    kept: dict[int, torch.UntypedStorage] = {}
    was_training = {layer: layer.training for layer in net.modules()}

    def keep(tensor: Tensor) -> Tensor:
        kept[memory_of(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.inference_mode(False), torch.enable_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        own = stand_ins(net, lambda tensor: _hollow(tensor, stored))
        images = torch.empty(shape, dtype=stored)
        try:
            net.train()
            with (
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
                torch.autocast("cpu", dtype=computed, enabled=computed != stored),
            ):
                outputs = torch.func.functional_call(net, own, images, tie_weights=False)
        except RAISED as error:  # it traced in evaluation, but trains by numbers
            raise Untraceable(why(net, error, shape=shape)) from error
        finally:
            for layer, training in was_training.items():
                layer.training = training
    del outputs
    for tensor in [*own.values(), images]:
        kept.pop(memory_of(tensor), None)
    return sum(storage.nbytes() for storage in kept.values())


def state_per_weight(optimizer: MakeOptimizer) -> float:
    """Numbers that an optimizer keeps for each weight, found by a step on ten, less what it keeps for a tensor."""
    weights = nn.Parameter(torch.zeros(10))
    weights.grad = torch.ones(10)
    made = optimizer([{"params": [weights]}])
    made.step()
    tensors = [value for value in made.state[weights].values() if isinstance(value, Tensor)]
    return sum(tensor.numel() for tensor in tensors if tensor.shape == weights.shape) / weights.numel()


def _hollow(tensor: Tensor, stored: torch.dtype) -> Tensor:
    dtype = stored if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype).requires_grad_(tensor.requires_grad)


def _bytes(tensors: Iterable[Tensor], stored: torch.dtype) -> int:
    return sum(one.numel() * (stored if one.is_floating_point() else one.dtype).itemsize for one in tensors)
