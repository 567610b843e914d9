"""The receptive field of every operation of a network, exact or refused.

Operation by operation, what the outputs see follows from what the inputs see, by the rules of models/rules.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from models.analysis.axes import Sight, UnknownReceptiveField, images_of
from models.analysis.intervals import steps
from models.analysis.op_rules import outputs_of, start_of
from models.analysis.trace import Operation, Trace, memory_of

OVERWRITTEN = "it reads what was overwritten under another shape"


def receptive_fields(trace: Trace) -> list[Sight | None]:
    """What the first output of each operation sees of the images, None where it does not depend on them.

    Raises: UnknownReceptiveField, with the layer and the operation, for one that is not known.
    """
    found, unknown = known_fields(trace)
    if unknown is not None:
        raise UnknownReceptiveField(unknown)
    return found


def known_fields(trace: Trace) -> tuple[list[Sight | None], str | None]:
    """What each operation sees where that is known, and the first operation of which it is not, with the reason.

    None stands for what does not depend on the images, and for all behind an unknown operation; other branches go on.
    """
    seeing, unknown = _Seeing(trace.images), None
    found: list[Sight | None] = []
    for operation in trace.operations:
        try:
            sights = outputs_of(operation, seeing.see)
        except UnknownReceptiveField as error:
            unknown = unknown or f"receptive field unknown: {operation.where}: {error}"
            seeing.lose(operation)
            found.append(None)
        else:
            seeing.note(operation, sights)
            found.append(sights[0] if sights else None)
    if unknown is None and trace.outputs is not None and seeing.lost(trace.outputs):
        unknown = f"receptive field unknown: of the output: {OVERWRITTEN}"
    return found, unknown


class _Seeing:
    """What every tensor of a trace sees, as far as it has been followed."""

    def __init__(self, images: Tensor) -> None:
        self._sights: dict[int, Sight | None] = {id(images): images_of(images.shape)}
        self._sharing: dict[int, set[int]] = {}  # tensors by the memory that they share
        self._stale: set[int] = set()
        self._lost: set[int] = set()  # memory into which something unknown was written
        self._frames: dict[int, tuple[Tensor, dict[int, int]]] = {}  # of constants: a part's whole, where it begins

    def see(self, tensor: Tensor) -> Sight | None:
        """What a tensor sees. Raises: UnknownReceptiveField where that was lost."""
        if self.lost(tensor):
            raise UnknownReceptiveField(OVERWRITTEN)
        return self._sights.get(id(tensor))

    def lost(self, tensor: Tensor) -> bool:
        """Whether a tensor was overwritten under another shape, or lies behind an operation that is not known."""
        return id(tensor) in self._stale

    def lose(self, operation: Operation) -> None:
        """Remember that nothing is known of the outputs of an operation, nor of what it wrote into."""
        for output in operation.outputs or operation.tensors:
            self._stale.add(id(output))
            if operation.in_place:
                self._stale |= self._sharing.get(memory_of(output), set())
                self._lost.add(memory_of(output))

    def note(self, operation: Operation, sights: Sequence[Sight | None]) -> None:
        """Remember what the outputs of an operation see."""
        for tensor in operation.tensors:
            self._sharing.setdefault(memory_of(tensor), set()).add(id(tensor))
        for output, sight in zip(operation.outputs, sights, strict=True):
            sharing = self._sharing.setdefault(memory_of(output), set())
            if operation.in_place and sight != self._sights.get(id(output)):
                self._stale |= sharing - {id(output)}
            sharing.add(id(output))
            self._sights[id(output)] = sight
            if sight is None and any(sights):  # statistics of a norm, if anybody reads them
                self._stale.add(id(output))
        if operation.name == "slice" and sights == [None] and operation.number("step") == 1:
            self._frame(operation)
        elif operation.name == "copy" and sights[0] is not None and id(operation.tensor(0)) in self._frames:
            self._fill(operation, sights[0])

    def _frame(self, operation: Operation) -> None:
        """Remember of which constant something is a part, and where in it that begins."""
        part, output = operation.tensor(0), operation.outputs[0]
        whole, starts = self._frames.get(id(part), (part, {}))
        dim = operation.number("dim") % part.ndim
        start = start_of(operation, part.shape[dim])
        self._frames[id(output)] = (whole, {**starts, dim: starts.get(dim, 0) + start})

    def _fill(self, operation: Operation, sight: Sight) -> None:
        """A map that is written into the middle of a constant is padded by the rest of it."""
        whole, starts = self._frames[id(operation.tensor(0))]
        for dim, start in starts.items():
            sight = sight.along(dim, steps(-start), count=whole.shape[dim])
        # Else something has been written into it before.
        if self._sights.get(id(whole)) is None and memory_of(whole) not in self._lost:
            self._sights[id(whole)] = sight
            self._stale.discard(id(whole))
