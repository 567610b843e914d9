"""The cost of a network: multiply-adds and training memory.

Multiply-adds are those of convolutions, linear layers and the products of attention, as in torch's flop counter at two
flops each. Norms, activations, poolings and biases are not counted, nor operations on weights alone. They are not time.
Memory is bytes of tensors, without the workspace of kernels and the allocator's rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import flop_registry

from models.analysis.trace import FORWARD_ERRORS, Operation, stand_ins, storage_of, trace_error

OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]  # takes parameter groups


class Precision(NamedTuple):
    """The type in which weights are stored, and the type of computation."""

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


class TrainingMemory(NamedTuple):
    """Bytes of a training step."""

    weights: int  # with the running statistics of norms
    gradients: int
    optimizer: int
    activations: int  # kept by the forward of one batch for its backward

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(self)


def multiply_adds(operation: Operation) -> int:
    """Multiply-adds of one operation by torch's formulas; 0 for operations without one."""
    formula = flop_registry.get(operation.function._overloadpacket)
    if formula is None:
        return 0
    return int(formula(*operation.args, **operation.kwargs, out_val=operation.outputs[0])) // 2


def separable_cost_ratio(kernel_size: Sequence[int], out_channels: int) -> Fraction:
    """Cost of a depthwise and a pointwise convolution relative to a standard one: 1 / C_out + 1 / K^2.

    Howard et al. 2017, section 3.1; K^2 is the product of `kernel_size`.
    """
    return Fraction(1, out_channels) + Fraction(1, math.prod(kernel_size))


def training_memory(
    net: nn.Module, shape: tuple[int, int, int, int], *, precision: str, optimizer: OptimizerFactory
) -> TrainingMemory:
    """Memory of training on batches of this shape, (N, C, H, W).

    Raises: ValueError for a precision outside `PRECISIONS`, TraceError for a network that needs values.
    """
    activations, stored = kept_for_backward(net, shape, precision=precision), PRECISIONS[precision].stored
    gradients = _num_bytes((parameter for parameter in net.parameters() if parameter.requires_grad), stored)
    return TrainingMemory(
        weights=_num_bytes([*net.parameters(), *net.buffers()], stored),
        gradients=gradients,
        optimizer=round(gradients * state_per_weight(optimizer)),
        activations=activations,
    )


def kept_for_backward(net: nn.Module, shape: tuple[int, int, int, int], *, precision: str) -> int:
    """Bytes that autograd keeps from the forward of a batch in training, each storage once.

    Weights and images do not count, but the copies that autocast makes of them for a mixed precision do, by its rules
    for a CPU. Measured on fake tensors, which hold no memory.
    Raises: ValueError for a precision outside `PRECISIONS`, TraceError for a network that needs values.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision} is not one of {', '.join(PRECISIONS)}")
    stored, computed = PRECISIONS[precision]
    kept: dict[int, torch.UntypedStorage] = {}
    was_training = {module: module.training for module in net.modules()}

    def keep(tensor: Tensor) -> Tensor:
        kept[storage_of(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.inference_mode(False), torch.enable_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        replacements = stand_ins(net, lambda tensor: _fake(tensor, stored))
        images = torch.empty(shape, dtype=stored)
        try:
            net.train()
            with (
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
                torch.autocast("cpu", dtype=computed, enabled=computed != stored),
            ):
                outputs = torch.func.functional_call(net, replacements, images, tie_weights=False)
        except FORWARD_ERRORS as error:  # a network that needs values in training only
            raise trace_error(net, error, shape=shape) from error
        finally:
            for module, training in was_training.items():
                module.training = training
    del outputs
    for tensor in [*replacements.values(), images]:
        kept.pop(storage_of(tensor), None)
    return sum(storage.nbytes() for storage in kept.values())


def state_per_weight(optimizer: OptimizerFactory) -> float:
    """Numbers that an optimizer keeps for each weight, measured by a step on ten; state per tensor does not count."""
    weights = nn.Parameter(torch.zeros(10))
    weights.grad = torch.ones(10)
    instance = optimizer([{"params": [weights]}])
    instance.step()
    state = [value for value in instance.state[weights].values() if isinstance(value, Tensor)]
    return sum(tensor.numel() for tensor in state if tensor.shape == weights.shape) / weights.numel()


def _fake(tensor: Tensor, stored: torch.dtype) -> Tensor:
    dtype = stored if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype).requires_grad_(tensor.requires_grad)


def _num_bytes(tensors: Iterable[Tensor], stored: torch.dtype) -> int:
    return sum(one.numel() * (stored if one.is_floating_point() else one.dtype).itemsize for one in tensors)
