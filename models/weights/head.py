"""The last layer of a file for a network with other classes."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from models.weights.files import shorten
from models.weights.match import Side, fit


class ClassNames(NamedTuple):
    """The classes of a file and those of the network; None if nothing names them."""

    theirs: Sequence[str] | None
    ours: Sequence[str] | None


class LastLayer(NamedTuple):
    """Whether a file's last layer is kept, its rows to copy where it is not, as pairs of numbers, and why."""

    is_kept: bool
    rows: Sequence[tuple[int, int]] = ()  # in the file, in the network
    description: str | None = None


def _compare(names: ClassNames, theirs: Side, *, ours: Side) -> LastLayer:
    for side in (theirs, ours):
        side.without_last_layer("auto")  # raises where there is none
    (num_theirs, width), (num_ours, own_width) = (_last_shape(side) for side in (theirs, ours))
    if width != own_width:
        return LastLayer(False, description=f"new: it has {own_width:,} inputs, the file's {width:,}")
    if names.theirs is None or names.ours is None:
        return _compare_numbers(num_theirs, num_ours)
    if num_theirs == num_ours and [*names.theirs] == [*names.ours]:
        return LastLayer(True, description="kept: the file has the same classes")
    places = {name: number for number, name in enumerate(names.theirs)}
    rows = [(places[name], number) for number, name in enumerate(names.ours) if name in places]
    if not rows:
        return LastLayer(False, description="new: the file has other classes")
    copied, num_others = shorten([names.ours[number] for _, number in rows]), num_ours - len(rows)
    others = f"; {num_others:,} others are new" if num_others else ""
    return LastLayer(False, rows, f"rows of {copied} copied by class name{others}")


def _last_shape(side: Side) -> tuple[int, int]:
    """Return the classes and inputs of the last layer."""
    num_classes, width = side.tensors[side.names[-2]].flatten(1).shape
    return num_classes, width


def _compare_numbers(num_theirs: int, num_ours: int) -> LastLayer:
    if num_theirs == num_ours:
        return LastLayer(True, description=f"kept: the file has {num_theirs:,} classes too, without names to compare")
    return LastLayer(False, description=f"new: the file has {num_theirs:,} classes, the network {num_ours:,}")


def choose_last_layer(head: str | ClassNames, theirs: Side, *, ours: Side) -> LastLayer:
    """Decide as configured, "keep" or "replace", or by class names; by their number where the file does not name them.

    Raises: ValueError when the last two tensors of a side are no linear layer.
    """
    return _compare(head, theirs, ours=ours) if isinstance(head, ClassNames) else LastLayer(head == "keep")


def copy_rows(rows: Sequence[tuple[int, int]], theirs: Side, *, ours: Side) -> None:
    """Copy rows of the last weight and bias, as pairs of numbers, into the network's tensors."""
    sources, targets = ([pair[side] for pair in rows] for side in (0, 1))
    for source, target in zip(theirs.names[-2:], ours.names[-2:], strict=True):
        place: Tensor = ours.tensors[target]
        place[targets] = fit(theirs.tensors[source][sources], place[targets]).to(place.dtype)
