"""The last layer of a file for a network with other classes."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from models.weights.files import shorten
from models.weights.match import Side, fit


class ClassNames(NamedTuple):
    """The classes of a file, None if nothing names them, and those of the network."""

    theirs: Sequence[str] | None
    ours: Sequence[str]


class LastLayer(NamedTuple):
    """Whether a file's last layer is kept, its rows to copy where it is not, as pairs of numbers, and why."""

    is_kept: bool
    rows: Sequence[tuple[int, int]] = ()  # in the file, in the network
    description: str | None = None


def _compare(names: ClassNames, theirs: Side, *, ours: Side) -> LastLayer:
    for side in (theirs, ours):
        side.without_last_layer()  # raises where there is none
    (num_theirs, width), (num_ours, own_width) = (
        side.tensors[side.names[-2]].flatten(1).shape for side in (theirs, ours)
    )
    if names.theirs is None and num_theirs == num_ours:
        return LastLayer(True, description=f"kept: the file has {num_theirs:,} classes too, and does not name them")
    if names.theirs is None:
        return LastLayer(
            False, description=f"starts small: the file has {num_theirs:,} classes, the network {num_ours:,}"
        )
    if num_theirs == num_ours and [*names.theirs] == [*names.ours]:
        return LastLayer(True, description="kept: the file has the same classes")
    places = {name: number for number, name in enumerate(names.theirs)} if width == own_width else {}
    rows = [(places[name], number) for number, name in enumerate(names.ours) if name in places]
    if not rows:
        return LastLayer(False, description="starts small: the file has other classes")
    copied, num_others = shorten([names.ours[number] for _, number in rows]), num_ours - len(rows)
    others = f"; {num_others:,} others start small" if num_others else ""
    return LastLayer(False, rows, f"rows of {copied} copied by class name{others}")


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
