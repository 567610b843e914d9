"""The operations of a network on a batch of images, recorded on torch's `meta` device without computing any values."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NETWORK_ITSELF = "the network itself"  # the module with the empty name
POINTWISE = {  # elementwise operations that torch does not tag as such
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
    """One call of a torch operation on meta tensors."""

    function: OpOverload
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    outputs: tuple[Tensor, ...]
    layer: str  # name of the innermost module that is running
    call: int  # number of that module's call

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
        named = {argument.name: argument.default_value for argument in self.function._schema.arguments}
        given = {**dict(zip(named, self.args, strict=False)), **self.kwargs}
        return named.get(name) if given.get(name) is None else given[name]

    def integer(self, name: str) -> int:
        """An integer argument."""
        value = self.argument(name)
        assert isinstance(value, int), f"{self.name} has no integer {name}"
        return value

    def integers(self, name: str) -> list[int]:
        """An argument that is an integer or a list of them; empty if it is not given."""
        value = self.argument(name)
        values = value if isinstance(value, list | tuple) else [value]
        return [one for one in values if isinstance(one, int)]

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
    """A recorded forward."""

    images: Tensor
    parameters: dict[str, Tensor]  # on the meta device
    operations: list[Operation]
    module_outputs: list[tuple[str, object]]  # of every call, in the order of completion
    outputs: Tensor | None  # None if the forward was stopped early or returned no tensor

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

    def __init__(self, net: nn.Module, error: Exception, *, shape: tuple[int, ...]) -> None:
        reason = str(error).partition("\n")[0]
        hint = " (make constants buffers, or create them on x.device)" if "expected device meta" in reason else ""
        super().__init__(f"{type(net).__name__} does not run on shapes (N, C, H, W) = {shape}: {reason}{hint}")


def dtype_of(net: nn.Module) -> torch.dtype:
    """The type of the images that a network takes: that of its first floating-point parameter, or float32."""
    return next((one.dtype for one in net.parameters() if one.is_floating_point()), torch.float32)


def storage_of(tensor: Tensor) -> int:
    """An identifier of the storage of a tensor, which its views share."""
    return int(tensor.untyped_storage()._cdata)


def stand_ins(net: nn.Module, make: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Replacements for all parameters and buffers, for `functional_call` with `tie_weights=False`.

    Shared tensors have a name in each module, modules that are registered twice only one: it restores no others.
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

    `until` names a module after which it stops. Raises: TraceError if the network needs values or another shape.
    """
    recorder, outputs = _Recorder(), None
    with torch.inference_mode(False), torch.no_grad():  # inference mode would hide the parts of composite operations
        images = torch.empty(shape, device="meta", dtype=dtype_of(net))
        try:
            replacements = stand_ins(net, lambda tensor: torch.empty_like(tensor, device="meta"))
            hooks = _module_names(net, recorder, until=until)
            with in_mode(net, training=False), hooks, torch.device("meta"), recorder:
                outputs = torch.func.functional_call(net, replacements, images, tie_weights=False)
        except _StoppedError:
            pass
        except FORWARD_ERRORS as error:
            raise TraceError(net, error, shape=shape) from error
    parameters = {name: replacements[name] for name, _ in net.named_parameters()}
    result = outputs if isinstance(outputs, Tensor) else None
    return Trace(images, parameters, recorder.operations, recorder.module_outputs, result)


@contextmanager
def in_mode(net: nn.Module, *, training: bool) -> Iterator[None]:
    """Set every module to training or evaluation mode inside the block, and restore its mode after it."""
    before = {module: module.training for module in net.modules()}
    net.train(training)
    try:
        yield
    finally:
        for module, was_training in before.items():
            module.training = was_training


class _StoppedError(Exception): ...


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its modes untyped
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves its modes untyped
        self.operations: list[Operation] = []
        self.module_outputs: list[tuple[str, object]] = []
        self.running: list[tuple[str, int]] = [("", 0)]

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[object, ...] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        outputs = tuple(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.operations.append(Operation(func, args, kwargs or {}, outputs, *self.running[-1]))
        return result


@contextmanager
def _module_names(net: nn.Module, recorder: _Recorder, *, until: str | None) -> Iterator[None]:
    calls = itertools.count(1)

    def enter(name: str) -> None:
        recorder.running.append((name, next(calls)))

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
