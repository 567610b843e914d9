"""What a network costs: parameters, multiply-adds, and the memory that training it takes.

Multiply-adds are those of convolutions, linear layers and the products of attention, as torch's own flop counter has
them, two flops each; norms, activations, poolings and biases are not counted. They are not time. Memory is counted in
bytes of tensors, without the workspace of kernels and what an allocator rounds up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import flop_registry

from models.tracing import Operation, memory_of

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

# Lightning's names, and in what a network then computes where it may.
PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


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


def separable_ratio(kernel_size: tuple[int, int], out_channels: int) -> Fraction:
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
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    return Memory(
        weights=_bytes([*net.parameters(), *net.buffers()]),
        gradients=_bytes(trained),
        optimizer=round(_bytes(trained) * state_per_weight(optimizer)),
        activations=kept_for_backward(net, shape, precision=precision),
    )


def kept_for_backward(net: nn.Module, shape: tuple[int, int, int, int], *, precision: str) -> int:
    """Bytes that autograd keeps from the forward of a batch in training, each piece of memory once; no weights.

    Counted where it happens, on tensors without memory. Weights that are cast for a mixed precision are counted: they
    are kept too.

    Raises: ValueError for a precision that is none of PRECISIONS.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision} is not one of {', '.join(PRECISIONS)}")
    mixed = PRECISIONS[precision]
    kept: dict[int, torch.UntypedStorage] = {}
    was_training = {layer: layer.training for layer in net.modules()}

    def keep(tensor: Tensor) -> Tensor:
        kept[memory_of(tensor)] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        own = {name: _hollow(tensor) for name, tensor in [*net.named_parameters(), *net.named_buffers()]}
        images = torch.empty(shape)
        try:
            net.train()
            with (
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
                torch.autocast("cpu", dtype=mixed, enabled=mixed != torch.float32),
            ):
                outputs = torch.func.functional_call(net, own, images)
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
    made = optimizer([weights])
    made.step()
    tensors = [value for value in made.state[weights].values() if isinstance(value, Tensor)]
    return sum(tensor.numel() for tensor in tensors if tensor.shape == weights.shape) / weights.numel()


def _hollow(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).requires_grad_(tensor.requires_grad)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
