"""The cost of a network: multiply-adds and training memory.

Multiply-adds are those of convolutions, linear layers and the products of attention, as in torch's flop counter at two
flops each. Norms, activations, poolings and biases are not counted, nor operations on weights alone.
Memory is bytes of tensors, without the workspace of kernels and the allocator's rounding.
"""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import flop_registry

from models.analysis.trace import FORWARD_ERRORS, Operation, TraceError, in_mode, stand_ins, storage_of
from models.arguments import require
from models.learning.recipe import OptimizerFactory


class Precision(NamedTuple):
    """The types in which weights are stored and computations run."""

    stored: torch.dtype
    computed: torch.dtype


PRECISIONS = {  # by Lightning's names
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
    return int(formula(*operation.args, **operation.kwargs, out_val=operation.outputs[0])) // 2 if formula else 0


def separable_cost_ratio(kernel_size: Sequence[int], out_channels: int) -> Fraction:
    """Cost of a depthwise and a pointwise convolution relative to a standard one (Howard et al. 2017, section 3.1)."""
    return Fraction(1, out_channels) + Fraction(1, math.prod(kernel_size))


def training_memory(
    net: nn.Module, shape: tuple[int, int, int, int], *, precision: str, optimizer: OptimizerFactory
) -> TrainingMemory:
    """Memory of training on batches of this shape, (N, C, H, W). Raises: ValueError, TraceError."""
    activations, stored = kept_for_backward(net, shape, precision=precision), PRECISIONS[precision].stored
    weights = _num_bytes([*net.parameters(), *net.buffers()], stored)
    gradients = _num_bytes((one for one in net.parameters() if one.requires_grad), stored)
    return TrainingMemory(weights, gradients, round(gradients * state_per_weight(optimizer)), activations)


def kept_for_backward(net: nn.Module, shape: tuple[int, int, int, int], *, precision: str) -> int:
    """Bytes that autograd keeps from the forward of a batch in training, each storage once; measured on fake tensors.

    Weights and images do not count, but the copies that autocast makes of them do, by its rules for a CPU.
    Raises: ValueError for a precision outside `PRECISIONS`, TraceError for a network that needs values.
    """
    require(precision in PRECISIONS, f"is not one of {', '.join(PRECISIONS)}", precision=precision)
    stored, computed = PRECISIONS[precision]
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[storage_of(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.inference_mode(False), torch.enable_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        replacements = stand_ins(net, lambda tensor: _fake(tensor, stored))
        images = torch.empty(shape, dtype=stored)
        try:
            with (
                in_mode(net, training=True),
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
                torch.autocast("cpu", dtype=computed, enabled=computed != stored),
            ):
                outputs = torch.func.functional_call(net, replacements, images, tie_weights=False)
        except FORWARD_ERRORS as error:  # a network that needs values in training only
            raise TraceError(net, error, shape=shape) from error
    del outputs
    for tensor in [*replacements.values(), images]:
        kept.pop(storage_of(tensor), None)
    return sum(storage.nbytes() for storage in kept.values())


def state_per_weight(optimizer: OptimizerFactory) -> float:
    """Numbers that an optimizer keeps for each weight, measured by a step on ten; state per tensor does not count."""
    weights = nn.Parameter(torch.zeros(10))
    weights.grad = torch.ones(10)
    instance = optimizer([{"params": [weights]}])
    instance.step(lambda: 0.0)  # some compute gradients in it
    state = instance.state[weights].values()
    return float(sum(isinstance(value, Tensor) and value.shape == weights.shape for value in state))


def _fake(tensor: Tensor, stored: torch.dtype) -> Tensor:
    dtype = stored if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype).requires_grad_(tensor.requires_grad)


def _num_bytes(tensors: Iterable[Tensor], stored: torch.dtype) -> int:
    return sum(one.numel() * (stored if one.is_floating_point() else one.dtype).itemsize for one in tensors)
