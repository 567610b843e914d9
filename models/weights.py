"""Published weights: the tensors of a file, matched one by one with a network's own.

Names decide where they are known (`models/layouts.py`), the order of the file where they
are not; shapes are checked either way. What is not matched is an error.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from models.attention import TABLE, resize_table
from models.layers import batch_norms, set_batch_norm
from models.layouts import LEAVES, Layout, recognize
from models.tensor_files import SAFETENSORS, read, shorten

COUNTER = "num_batches_tracked"  # of batch norms, the only numbers without a shape: not in old files, and not needed
PORTED = "tf_"  # so begin timm's names of networks that were ported from TensorFlow
OURS = Layout("convoy", ())
UNKNOWN = Layout("nobody known, so by order", ())

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Loaded:
    """What was done with a file: whose names it has, and which of its tensors went where."""

    names_of: str
    wrapper: str | None  # in which the file held them
    num_tensors: int
    reshaped: tuple[str, ...]  # names of the file
    left_out: tuple[str, ...]  # names of the file
    kept: tuple[str, ...]  # names of the network, whose first weights remain
    norm_eps: float | None  # that the batch norms were given; None: they kept theirs

    def __str__(self) -> str:
        wrapped = f" in {self.wrapper}" if self.wrapper else ""
        parts = [f"{self.num_tensors} tensors loaded{wrapped}, named as by {self.names_of}"]
        lists = {"reshaped": self.reshaped, "left out of the file": self.left_out, "as first drawn": self.kept}
        parts += [f"{label}: {shorten(names)}" for label, names in lists.items() if names]
        return "; ".join([*parts, *([f"batch norm eps {self.norm_eps:g}"] if self.norm_eps else [])])


class Side(NamedTuple):
    """Tensors in the order in which they are matched."""

    names: list[str]
    tensors: Tensors

    def without_last_layer(self) -> Side:
        """All but the last weight and bias. Raises: ValueError when the last two tensors are no such layer."""
        weight, bias = (self.tensors[name] for name in self.names[-2:])
        if weight.ndim not in (2, 4) or bias.shape != weight.shape[:1]:
            last = self.shown(self.names[-2:])
            raise ValueError(f"weights.head=replace: {last} are not the last layer of a classifier")
        return Side(self.names[:-2], self.tensors)

    def shown(self, names: Collection[str]) -> str:
        """Some of the names, with shapes, for people."""
        return shorten([f"{name} {tuple(self.tensors[name].shape)}" for name in self.names if name in names])


def load_weights(
    net: nn.Module,
    path: Path,
    *,
    head: str = "keep",
    stem: str = "keep",
    skip: Sequence[str] = (),
    norm_eps: float | None = None,
) -> Loaded:
    """Give `net` the weights of a file by torchvision, timm, Facebook's ConvNeXt or this project.

    `head="replace"` leaves out the last linear layer, for other classes. `stem="adapt"` fits
    the first convolution to other input channels: the sum of its kernels for one, else the kernels in
    turn, scaled to the same total. `skip` names tensors or modules, of the file or the network, that may be
    left out. The batch norms get the eps of the file's publisher unless `norm_eps` says another.

    Raises: FileNotFoundError; ValueError when the file cannot be read, or a tensor of either side has no match.
    """
    for name, value, other in (("head", head, "replace"), ("stem", stem, "adapt")):
        if value not in ("keep", other):
            raise ValueError(f"weights.{name}={value} must be keep or {other}")
    file, own = read(path), net.state_dict()
    skipped = expand(skip, [*file.tensors, *own])
    given = {name: tensor for name, tensor in file.tensors.items() if name not in skipped}
    layout = OURS if is_ours(given, own) else recognize(given) or UNKNOWN
    if layout.norm_eps is not None and any(
        name.startswith(PORTED) for name in (path.name, path.absolute().parent.name)
    ):
        raise ValueError(f"weights={path}: timm's {PORTED} variants pad their images as TensorFlow does, ours do not")
    if not any(tensor.ndim == 0 for tensor in given.values()):
        skipped |= {name for name in own if name.endswith(COUNTER)}
    theirs = Side(sort(given, own, layout=layout, path=path), given)
    ours = Side([name for name in own if name not in skipped], own)
    if head == "replace":
        theirs, ours = theirs.without_last_layer(), ours.without_last_layer()
    if stem == "adapt":
        theirs = adapt_stem(theirs, ours)
    pairs = pair(theirs, ours, layout=layout, path=path)
    net.load_state_dict({mine: fit(theirs.tensors[its], own[mine]) for its, mine in pairs}, strict=False)
    eps = norm_eps or file.norm_eps or layout.norm_eps
    set_batch_norm(net, eps=eps)
    return Loaded(
        names_of=layout.name,
        wrapper=file.wrapper,
        num_tensors=len(pairs),
        reshaped=tuple(its for its, mine in pairs if file.tensors[its].shape != own[mine].shape),
        left_out=tuple(name for name in file.tensors if name not in theirs.names),
        kept=tuple(name for name in own if name not in ours.names and not name.endswith(COUNTER)),
        norm_eps=eps if batch_norms(net) else None,
    )


def expand(skip: Sequence[str], names: Sequence[str]) -> set[str]:
    """The names that are one of `skip`, or inside a module that is.

    Raises: ValueError for one that means nothing on either side.
    """
    skipped: set[str] = set()
    for wanted in skip:
        meant = {name for name in names if name == wanted or name.startswith(f"{wanted.removesuffix('.')}.")}
        if not meant or not wanted:
            raise ValueError(f"weights.skip={wanted} is no tensor and no module of the file or the network")
        skipped |= meant
    return skipped


def is_ours(theirs: Tensors, ours: Tensors) -> bool:
    """Whether most names of the file are those of the network."""
    return 2 * len(theirs.keys() & ours.keys()) > len(theirs)


def sort(theirs: Tensors, ours: Tensors, *, layout: Layout, path: Path) -> list[str]:
    """The names of the file in the order of the network.

    Raises: ValueError when neither names nor order can tell it.
    """
    if layout is OURS:
        return [*(name for name in ours if name in theirs), *(name for name in theirs if name not in ours)]
    if layout is not UNKNOWN:
        return layout.sort(theirs)
    if path.suffix == SAFETENSORS:
        raise ValueError(
            f"{path} has names by nobody known ({shorten(list(theirs))}), and {SAFETENSORS} keeps no order"
        )
    return list(theirs)


def adapt_stem(theirs: Side, ours: Side) -> Side:
    """The file's first kernels with as many input channels as the network's.

    Shapes: (C_out, C_in, K, K) -> (C_out, channels, K, K).
    """
    kernels, wanted = theirs.tensors[theirs.names[0]].float(), ours.tensors[ours.names[0]]
    if kernels.ndim != 4 or kernels.shape[1] == wanted.shape[1]:
        return theirs
    have, channels = kernels.shape[1], wanted.shape[1]
    if channels == 1:
        adapted = kernels.sum(1, keepdim=True)
    else:
        adapted = kernels[:, [channel % have for channel in range(channels)]] * (have / channels)
    return Side(theirs.names, {**theirs.tensors, theirs.names[0]: adapted})


def pair(theirs: Side, ours: Side, *, layout: Layout, path: Path) -> list[tuple[str, str]]:
    """The name in the file and the name in the network of each tensor.

    Raises: ValueError, naming the first culprits, unless the two sides match one by one.
    """
    wrong: list[tuple[str, str]] = []
    if layout is OURS:
        extra, missing = set(theirs.names) - set(ours.names), set(ours.names) - set(theirs.names)
    else:
        extra, missing = unmatched(theirs, ours)
    if len(theirs.names) == len(ours.names) and not (layout is OURS and missing):
        pairs = list(zip(theirs.names, ours.names, strict=True))
        wrong = [names for names in pairs if not may_fit(*names, theirs=theirs, ours=ours)]
        if not wrong:
            return pairs
    # Where a tensor more here and one less there shift all between them, the runs of equal kinds say which they are.
    if wrong and (not missing or len(wrong) <= len(missing)):
        text = misfits(wrong, theirs=theirs, ours=ours)
    else:
        parts = [f"it has nothing for {ours.shown(missing)}"] if missing else []
        parts += [f"it has {theirs.shown(extra)}, for which there is no place"] if extra else []
        text = f"{' and '.join(parts)}; weights.skip=[NAME] names what may be left out"
    raise ValueError(f"{path} does not fit this network: {text}")


def misfits(wrong: Sequence[tuple[str, str]], *, theirs: Side, ours: Side) -> str:
    """Which shapes differ, and what can be done about it."""
    its, mine = ({names[side] for names in wrong} for side in (0, 1))
    parts = [f"{theirs.shown(its)} for {ours.shown(mine)}"]
    if its & set(theirs.names[-2:]):
        parts.append("weights.head=replace leaves out the last layer, for other classes")
    given, wanted = theirs.tensors[theirs.names[0]], ours.tensors[ours.names[0]]
    if theirs.names[0] in its and given.ndim == wanted.ndim == 4:
        if given.shape[2:] != wanted.shape[2:]:
            parts.append("the network was built for small images, model.image_size=224 builds the published one")
        else:
            parts.append("weights.stem=adapt changes the number of input channels")
    return "; ".join(parts)


def unmatched(theirs: Side, ours: Side) -> tuple[set[str], set[str]]:
    """Which tensors of either side are too many, by the longest runs of the same kinds."""
    its, mine = ([kind(name, side.tensors[name]) for name in side.names] for side in (theirs, ours))
    extra, missing = set(theirs.names), set(ours.names)
    for at, there, size in SequenceMatcher(None, its, mine, autojunk=False).get_matching_blocks():
        extra -= set(theirs.names[at : at + size])
        missing -= set(ours.names[there : there + size])
    return extra, missing


def kind(name: str, tensor: Tensor) -> str:
    """What tensors with the same place have in common: the last part of the name, the shape without ones."""
    return f"{leaf(name)} {bare_shape(tensor)}"


def leaf(name: str) -> str | None:
    """The last part of a name where it is one that all use."""
    last = name.rpartition(".")[2]
    return last if last in LEAVES else None


def bare_shape(tensor: Tensor) -> tuple[int, ...]:
    """A shape without ones: (C, 1, 1) is (C,)."""
    return tuple(size for size in tensor.shape if size > 1)


def may_fit(its: str, mine: str, *, theirs: Side, ours: Side) -> bool:
    """Whether a tensor belongs to a place by the end of its name and its shape.

    Shapes may differ in ones, flattened kernels and the size of a table of offsets.
    """
    given, wanted = theirs.tensors[its], ours.tensors[mine]
    if leaf(its) and leaf(mine) and leaf(its) != leaf(mine):
        return False
    flattened = wanted.ndim == 2 and given.ndim == 4 and given.flatten(1).shape == wanted.shape
    is_table = mine.endswith(TABLE) and given.ndim == 2 and given.shape[1:] == wanted.shape[1:]
    return (
        bare_shape(given) == bare_shape(wanted) or flattened or (is_table and math.isqrt(len(given)) ** 2 == len(given))
    )


def fit(theirs: Tensor, ours: Tensor) -> Tensor:
    """A tensor in the shape of its place."""
    if theirs.numel() == ours.numel():
        return theirs.reshape(ours.shape)
    side = (math.isqrt(len(ours)) + 1) // 2
    return resize_table(theirs, side, width=side)
