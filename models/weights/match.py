"""Match the tensors of a file with those of a network one by one, or explain why they do not match."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from models.arguments import ArgumentError, Part
from models.attention import resize_table
from models.options import SMALL_IMAGE
from models.weights.files import shorten
from models.weights.names import LEAVES, OURS, Layout

Tensors = Mapping[str, Tensor]


class Side(NamedTuple):
    """The tensors of a file or of a network, in the order in which they are matched."""

    names: list[str]
    tensors: Tensors
    tables: frozenset[str] = frozenset()  # relative biases, which may be resized

    def without_last_layer(self, head: str = "replace") -> Side:
        """Return all but the last weight and bias, for this value of `head`.

        Raises: ValueError when the last two tensors are no linear layer.
        """
        shapes = [self.tensors[name].shape for name in self.names[-2:]]
        if len(shapes) < 2 or len(shapes[0]) not in (2, 4) or shapes[1] != shapes[0][:1]:
            last = self.describe(self.names[-2:])
            raise ArgumentError(("head", head), f": {last} are not the last layer of a classifier")
        return self._replace(names=self.names[:-2])

    def describe(self, names: Collection[str]) -> str:
        """Return the first of some names, with shapes."""
        return shorten([f"{name} {tuple(self.tensors[name].shape)}" for name in self.names if name in names])


def _leaf(name: str) -> str | None:
    """Return the last part of a name if all publishers use it."""
    last = name.rpartition(".")[2]
    return last if last in LEAVES else None


def _squeezed(tensor: Tensor) -> tuple[int, ...]:
    return tuple(size for size in tensor.shape if size > 1)


def _may_fit(source: str, target: str, *, theirs: Side, ours: Side) -> bool:
    """Return whether name endings and shapes fit, up to ones, flattened kernels and the size of relative biases."""
    tensor, place = theirs.tensors[source], ours.tensors[target]
    if _leaf(source) and _leaf(target) and _leaf(source) != _leaf(target):
        return False
    flattened = place.ndim == 2 and tensor.ndim == 4 and tensor.flatten(1).shape == place.shape
    is_table = target in ours.tables and tensor.ndim == 2 and tensor.shape[1:] == place.shape[1:]
    is_square = is_table and math.isqrt(len(tensor)) ** 2 == len(tensor)
    return _squeezed(tensor) == _squeezed(place) or flattened or is_square


def _depends_on_image_size(tensor: Tensor, place: Tensor, *, is_first: bool) -> bool:
    """Return whether shapes differ as for small and large images: in the first kernels or the inputs of a matrix."""
    if is_first and tensor.ndim == place.ndim == 4:
        return tensor.shape[2:] != place.shape[2:]
    return tensor.ndim == place.ndim == 2 and len(tensor) == len(place) and tensor.shape[1] != place.shape[1]


def _describe_wrong_shapes(wrong: Sequence[tuple[str, str]], *, theirs: Side, ours: Side) -> list[Part]:
    """Return the shapes that differ, and the options that can help."""
    sources, targets = zip(*wrong, strict=True)
    parts: list[Part] = [f"{theirs.describe(sources)} for {ours.describe(targets)}"]
    first, last = theirs.names[0], theirs.names[-2:]
    if any(source in last for source, _ in wrong):
        parts += ["; ", ("head", "replace"), " leaves out the last layer, for other classes"]
    for source, target in wrong:
        tensor, place = theirs.tensors[source], ours.tensors[target]
        if source not in last and _depends_on_image_size(tensor, place, is_first=source == first):
            small = ("; the network was built for small images, ", ("image_size", 224), " builds the published one")
            large = ("; the file's network was built for small images, ", ("image_size", SMALL_IMAGE), " does so")
            parts += small if tensor.numel() > place.numel() else large
            break
        if source == first and tensor.ndim == place.ndim == 4 and tensor.shape[1] != place.shape[1]:
            parts += ["; ", ("stem", "adapt"), " changes the number of input channels"]
    return parts


def _unmatched(theirs: Side, ours: Side) -> tuple[set[str], set[str]]:
    """Return the tensors that only one side has, by the longest runs of equal name endings and shapes."""
    kinds = [f"{_leaf(name)} {_squeezed(theirs.tensors[name])}" for name in theirs.names]
    our_kinds = [f"{_leaf(name)} {_squeezed(ours.tensors[name])}" for name in ours.names]
    extra, missing = set(theirs.names), set(ours.names)
    for start, our_start, size in SequenceMatcher(None, kinds, our_kinds, autojunk=False).get_matching_blocks():
        extra -= set(theirs.names[start : start + size])
        missing -= set(ours.names[our_start : our_start + size])
    return extra, missing


def _describe_differences(wrong: Sequence[tuple[str, str]], *, theirs: Side, ours: Side, layout: Layout) -> list[Part]:
    """Return the few pairs whose shapes differ, or else the tensors that one side lacks."""
    if layout is OURS:
        extra, missing = set(theirs.names) - set(ours.names), set(ours.names) - set(theirs.names)
    else:
        extra, missing = _unmatched(theirs, ours)
    # One tensor too many and one too few shift all pairs between them; then fewer tensors are missing than wrong.
    if wrong and (not missing or len(wrong) <= len(missing)):
        return _describe_wrong_shapes(wrong, theirs=theirs, ours=ours)
    parts = [f"the file lacks {ours.describe(missing)}"] if missing else []
    parts += [f"the network has no place for {theirs.describe(extra)}"] if extra else []
    skip, variant = ("skip", "[NAME]"), ("variant", "NAME")
    return [" and ".join(parts), "; ", skip, " leaves tensors out, ", variant, " builds the file's network"]


def fit(tensor: Tensor, place: Tensor) -> Tensor:
    """Return a tensor of the file in the shape of its place; a table of relative biases is resized."""
    if tensor.numel() == place.numel():
        return tensor.reshape(place.shape)
    side = (math.isqrt(len(place)) + 1) // 2
    return resize_table(tensor, side, width=side)


def match(theirs: Side, ours: Side, *, layout: Layout, path: Path) -> list[tuple[str, str]]:
    """Return pairs of names in file and network. Raises: ValueError unless all tensors match one by one."""
    in_place = theirs.names == ours.names if layout is OURS else len(theirs.names) == len(ours.names)
    pairs = list(zip(theirs.names, ours.names, strict=True)) if in_place else []
    wrong = [names for names in pairs if not _may_fit(*names, theirs=theirs, ours=ours)]
    if in_place and not wrong:
        return pairs
    differences = _describe_differences(wrong, theirs=theirs, ours=ours, layout=layout)
    raise ArgumentError(f"{path} does not fit this network: ", *differences)
