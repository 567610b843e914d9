"""What a network does to a batch of images, operation by operation, found by running it on shapes alone.

Networks run as they are, on torch's `meta` device, which knows shapes and holds no numbers: whatever a `forward` does
in Python, torch comes to one of a few hundred operations, and those are written down. Nothing is compiled or rewritten,
so a network that torch.fx or torch.export can take apart runs here too, and many that they cannot.
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

ITSELF = "the network itself"  # whose name is empty among its modules
# Entry by entry, though torch does not say so of them.
POINTWISE = {
    "hardswish", "to_copy", "alias", "detach", "copy", "prelu_kernel", "lift_fresh", "native_dropout", "expand",
    "floor_divide", "remainder",
}  # fmt: skip

# Of the shape of another tensor, but not of its numbers.
CONSTANT = {f"{kind}_like" for kind in ("zeros", "ones", "full", "empty")}
CONSTANT |= {f"new_{kind}" for kind in ("zeros", "ones", "full", "empty")} | {"zero"}


@dataclass(frozen=True, eq=False)
class Operation:
    """One call of a torch operation, with tensors of shapes alone.

    `layer` is the name of the innermost module at work, `call` tells its calls apart.
    """

    function: torch._ops.OpOverload
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    outputs: tuple[Tensor, ...]
    layer: str
    call: int

    @property
    def name(self) -> str:
        """As torch calls it, in place or not: `convolution`, `relu`."""
        return self.function._schema.name.removeprefix("aten::").removesuffix("_").removeprefix("_")

    @property
    def where(self) -> str:
        """The operation and its layer, for people."""
        return f"{self.name} in {self.layer or ITSELF}"

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors whose numbers it reads."""
        if self.name in CONSTANT:
            return []
        if self.name == "fill":  # by a number, or by a tensor of one
            return self.tensors[1:]
        return self.tensors[1:] if self.name == "copy" else self.tensors

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among its arguments."""
        return [leaf for leaf in tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor)]

    @property
    def pointwise(self) -> bool:
        """Whether each entry of the output is made of the same entry of every input."""
        return torch.Tag.pointwise in self.function.tags or self.name in POINTWISE

    @property
    def in_place(self) -> bool:
        """Whether it writes into one of its tensors."""
        return bool(self.function._schema.is_mutable)

    def given(self, name: str) -> object:
        """An argument by its name in torch's signature, given or by default; None where there is none of that name."""
        for position, argument in enumerate(self.function._schema.arguments):
            if argument.name == name:
                value = self.args[position] if position < len(self.args) else self.kwargs.get(name)
                return argument.default_value if value is None else value
        return None

    def number(self, name: str) -> int:
        """The same of one that is a whole number."""
        value = self.given(name)
        assert isinstance(value, int), f"{self.name} has no number {name}"
        return value

    def numbers(self, name: str) -> list[int]:
        """The same of one that is a list of them, or a single one; empty where it is not given."""
        value = self.given(name)
        return list(value) if isinstance(value, list | tuple) else [value] if isinstance(value, int) else []

    def pair(self, name: str, default: Sequence[int] = (1, 1)) -> list[int]:
        """The same of one for rows and columns, of which torch writes equal ones once."""
        values = self.numbers(name) or list(default)
        return values * 2 if len(values) == 1 else values

    def tensor(self, position: int) -> Tensor:
        """The tensor at a position of its arguments."""
        value = self.args[position]
        assert isinstance(value, Tensor), f"{self.name} takes no tensor in place {position}"
        return value


class Trace(NamedTuple):
    """A run of a network: the batch, its parameters' stand-ins by name, what was done, and what came out.

    The last is None where the run was ended before, or is no tensor.
    """

    images: Tensor
    parameters: dict[str, Tensor]
    operations: list[Operation]
    outputs: Tensor | None

    def fed_by_images(self) -> set[int]:
        """The positions of the operations that depend on the images."""
        memory, fed = {memory_of(self.images)}, set()
        for position, operation in enumerate(self.operations):
            if any(memory_of(tensor) in memory for tensor in operation.inputs):
                fed.add(position)
                memory.update(map(memory_of, operation.outputs))
        return fed


class Untraceable(ValueError):
    """Why a network does not run on shapes alone."""


# By what somebody's forward does on shapes alone.
RAISED = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)


def why(net: nn.Module, error: Exception, *, shape: tuple[int, ...]) -> str:
    """That a network does not run on shapes alone, and the first line of the reason."""
    reason = str(error).partition("\n")[0]
    hint = " (make constants buffers, or of x.device)" if "expected device meta" in reason else ""
    return f"{type(net).__name__} does not run on shapes (N, C, H, W) = {shape}: {reason}{hint}"


def dtype_of(net: nn.Module) -> torch.dtype:
    """The type of the images that a network takes: that of its first parameter, float32 where there is none."""
    first = next((parameter.dtype for parameter in net.parameters() if parameter.is_floating_point()), None)
    return first or torch.float32


def memory_of(tensor: Tensor) -> int:
    """What tells the memory of a tensor, which its views share, from that of others."""
    return int(tensor.untyped_storage()._cdata)


def stand_ins(net: nn.Module, make: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Other tensors for all of a network's own, for `functional_call` with `tie_weights=False`.

    Each place is named once, also in a module that is registered twice, or its own tensor would not come back; what
    shares a tensor shares the stand-in.
    """
    made: dict[int, Tensor] = {}
    places, each = {}, {"recurse": False, "remove_duplicate": False}
    for prefix, layer in net.named_modules():
        own = [*layer.named_parameters(**each), *layer.named_buffers(**each)]
        for name, tensor in own:
            places[f"{prefix}.{name}" if prefix else name] = made.setdefault(id(tensor), make(tensor))
    return places


def trace(net: nn.Module, shape: tuple[int, int, int, int], *, until: str | None = None) -> Trace:
    """Run a network in evaluation on a batch of this shape, (N, C, H, W); its own tensors are neither read nor changed.

    `until` is the name of a module at whose end the run is over.

    Raises: Untraceable for a network that needs numbers, or does not take this shape.
    """
    recorder, outputs = _Recorder(), None
    with torch.inference_mode(False), torch.no_grad():  # inference mode hides what whole layers are made of
        images = torch.empty(shape, device="meta", dtype=dtype_of(net))
        try:
            hollow = stand_ins(net, lambda tensor: torch.empty_like(tensor, device="meta"))
            with in_evaluation(net), _watching(net, recorder, until=until), torch.device("meta"), recorder:
                outputs = torch.func.functional_call(net, hollow, images, tie_weights=False)
        except _ReachedError:
            pass
        except RAISED as error:
            raise Untraceable(why(net, error, shape=shape)) from error
    parameters = {name: hollow[name] for name, _ in net.named_parameters()}
    return Trace(images, parameters, recorder.operations, outputs if isinstance(outputs, Tensor) else None)


@contextmanager
def in_evaluation(net: nn.Module) -> Iterator[None]:
    """Every module in evaluation inside the block, and as it was after it."""
    training = {layer: layer.training for layer in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for layer, before in training.items():
            layer.training = before


class _ReachedError(Exception):
    """Ends a run."""


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its modes untyped
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves its modes untyped
        self.operations: list[Operation] = []
        self.at_work: list[tuple[str, int]] = [("", 0)]
        self.calls = 0

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        outputs = tuple(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.operations.append(Operation(func, args, kwargs or {}, outputs, *self.at_work[-1]))
        return result


@contextmanager
def _watching(net: nn.Module, recorder: _Recorder, *, until: str | None) -> Iterator[None]:
    """Tell the recorder which module is at work."""

    def enter(name: str) -> None:
        recorder.calls += 1
        recorder.at_work.append((name, recorder.calls))

    def leave(name: str) -> None:
        recorder.at_work.pop()
        if name == until:
            raise _ReachedError

    def told(action: Callable[[str], None], name: str) -> Callable[..., None]:
        return lambda *_: action(name)

    with ExitStack() as hooks:
        for name, layer in net.named_modules():
            hooks.callback(layer.register_forward_pre_hook(told(enter, name), prepend=True).remove)
            hooks.callback(layer.register_forward_hook(told(leave, name)).remove)
        yield
