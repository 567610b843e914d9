"""The operations of a network on a batch of images, recorded on torch's `meta` device without computing any values.

Nothing is compiled or rewritten: every network that torch.fx or torch.export can handle is traced, and many others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NETWORK_ITSELF = "the network itself"  # the module with the empty name
# Elementwise operations that torch does not tag as pointwise.
POINTWISE = {
    "hardswish", "to_copy", "alias", "detach", "copy", "prelu_kernel", "lift_fresh", "native_dropout", "expand",
    "floor_divide", "remainder",
}  # fmt: skip
# Operations that use the shape of their input, but not its values.
CONSTANT = {f"{kind}_like" for kind in ("zeros", "ones", "full", "empty")}
CONSTANT |= {f"new_{kind}" for kind in ("zeros", "ones", "full", "empty")} | {"zero"}
# Exceptions that a forward may raise on shapes alone.
FORWARD_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)


@dataclass(frozen=True, eq=False)
class Operation:
    """One call of a torch operation on meta tensors.

    `layer` is the name of the innermost module that is running, `call` the number of its call.
    """

    function: torch._ops.OpOverload
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    outputs: tuple[Tensor, ...]
    layer: str
    call: int

    @property
    def name(self) -> str:
        """Torch's name without the mark of in-place variants: `convolution`, `relu`."""
        return self.function._schema.name.removeprefix("aten::").removesuffix("_").removeprefix("_")

    @property
    def location(self) -> str:
        """Operation and layer, for messages."""
        return f"{self.name} in {self.layer or NETWORK_ITSELF}"

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [leaf for leaf in tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor)]

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors whose values the operation reads."""
        if self.name in CONSTANT:
            return []
        return self.tensors[1:] if self.name in ("copy", "fill") else self.tensors

    @property
    def pointwise(self) -> bool:
        """Whether each output element depends on the same element of every input."""
        return torch.Tag.pointwise in self.function.tags or self.name in POINTWISE

    @property
    def in_place(self) -> bool:
        """Whether the operation writes to one of its arguments."""
        return bool(self.function._schema.is_mutable)

    def argument(self, name: str) -> object:
        """An argument by its name in torch's signature, or its default; None if the signature lacks it."""
        for position, argument in enumerate(self.function._schema.arguments):
            if argument.name == name:
                value = self.args[position] if position < len(self.args) else self.kwargs.get(name)
                return argument.default_value if value is None else value
        return None

    def integer(self, name: str) -> int:
        """An integer argument."""
        value = self.argument(name)
        assert isinstance(value, int), f"{self.name} has no integer {name}"
        return value

    def integers(self, name: str) -> list[int]:
        """An argument that is an integer or a list of them; empty if it is not given."""
        value = self.argument(name)
        if isinstance(value, list | tuple):
            return list(value)
        return [value] if isinstance(value, int) else []

    def pair(self, name: str, default: Sequence[int] = (1, 1)) -> list[int]:
        """An argument for rows and columns, which torch may give once for both."""
        values = self.integers(name) or list(default)
        return values * 2 if len(values) == 1 else values

    def tensor(self, position: int) -> Tensor:
        """The argument at a position, a tensor."""
        value = self.args[position]
        assert isinstance(value, Tensor), f"argument {position} of {self.name} is not a tensor"
        return value


class Trace(NamedTuple):
    """A recorded forward: the batch, the meta parameters by name, the operations, the result of every module call.

    The output is None if the forward was stopped early or returned no tensor.
    """

    images: Tensor
    parameters: dict[str, Tensor]
    operations: list[Operation]
    module_outputs: list[tuple[str, object]]  # in the order of completion
    outputs: Tensor | None

    def image_dependent(self) -> set[int]:
        """Positions of the operations that depend on the images."""
        storages, dependent = {storage_of(self.images)}, set()
        for position, operation in enumerate(self.operations):
            if any(storage_of(tensor) in storages for tensor in operation.inputs):
                dependent.add(position)
                storages.update(map(storage_of, operation.outputs))
        return dependent


class TraceError(ValueError):
    """A network does not run on shapes alone."""


def trace_error(net: nn.Module, error: Exception, *, shape: tuple[int, ...]) -> TraceError:
    """The error for a forward that failed, with the first line of its reason."""
    reason = str(error).partition("\n")[0]
    hint = " (make constants buffers, or create them on x.device)" if "expected device meta" in reason else ""
    return TraceError(f"{type(net).__name__} does not run on shapes (N, C, H, W) = {shape}: {reason}{hint}")


def dtype_of(net: nn.Module) -> torch.dtype:
    """The type of the images that a network takes: that of its first floating-point parameter, or float32."""
    first = next((parameter.dtype for parameter in net.parameters() if parameter.is_floating_point()), None)
    return first or torch.float32


def storage_of(tensor: Tensor) -> int:
    """An identifier of the storage of a tensor, which its views share."""
    return int(tensor.untyped_storage()._cdata)


def stand_ins(net: nn.Module, make: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Replacements for all parameters and buffers, for `functional_call` with `tie_weights=False`.

    Modules that are registered twice have all their names: `functional_call` would not restore tensors without one.
    """
    made: dict[int, Tensor] = {}
    replacements = {}
    for prefix, module in net.named_modules():
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        for name, tensor in (*parameters, *buffers):
            replacements[f"{prefix}.{name}" if prefix else name] = made.setdefault(id(tensor), make(tensor))
    return replacements


def trace(net: nn.Module, shape: tuple[int, int, int, int], *, until: str | None = None) -> Trace:
    """Record the forward of a network in evaluation mode on a batch of this shape, (N, C, H, W).

    The tensors of the network are neither read nor changed. `until` names a module after which the forward stops.
    Raises: TraceError for a network that needs values, or does not accept this shape.
    """
    recorder, outputs = _Recorder(), None
    with torch.inference_mode(False), torch.no_grad():  # inference mode would hide the parts of composite operations
        images = torch.empty(shape, device="meta", dtype=dtype_of(net))
        try:
            replacements = stand_ins(net, lambda tensor: torch.empty_like(tensor, device="meta"))
            with evaluation_mode(net), _module_names(net, recorder, until=until), torch.device("meta"), recorder:
                outputs = torch.func.functional_call(net, replacements, images, tie_weights=False)
        except _StoppedError:
            pass
        except FORWARD_ERRORS as error:
            raise trace_error(net, error, shape=shape) from error
    parameters = {name: replacements[name] for name, _ in net.named_parameters()}
    result = outputs if isinstance(outputs, Tensor) else None
    return Trace(images, parameters, recorder.operations, recorder.module_outputs, result)


@contextmanager
def evaluation_mode(net: nn.Module) -> Iterator[None]:
    """Set every module to evaluation mode inside the block, and restore its mode after it."""
    training = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training


class _StoppedError(Exception): ...


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its modes untyped
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves its modes untyped
        self.operations: list[Operation] = []
        self.module_outputs: list[tuple[str, object]] = []
        self.running: list[tuple[str, int]] = [("", 0)]
        self.num_calls = 0

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        outputs = tuple(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.operations.append(Operation(func, args, kwargs or {}, outputs, *self.running[-1]))
        return result


@contextmanager
def _module_names(net: nn.Module, recorder: _Recorder, *, until: str | None) -> Iterator[None]:
    """Inform the recorder of running modules and their outputs."""

    def enter(name: str) -> None:
        recorder.num_calls += 1
        recorder.running.append((name, recorder.num_calls))

    def leave(name: str, output: object) -> None:
        recorder.running.pop()
        recorder.module_outputs.append((name, output))
        if name == until:
            raise _StoppedError

    with ExitStack() as hooks:
        for name, module in net.named_modules():
            hooks.callback(module.register_forward_pre_hook(lambda *_, name=name: enter(name), prepend=True).remove)
            hooks.callback(module.register_forward_hook(lambda *args, name=name: leave(name, args[-1])).remove)
        yield
