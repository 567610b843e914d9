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
from models.options import SMALL
from models.weights.files import SAFETENSORS, read, shorten
from models.weights.names import LEAVES, Layout, recognize

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
    image_size: int | None  # that the file's network was built for; None: it does not say

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
        last = self.shown(self.names[-2:])
        shapes = [self.tensors[name].shape for name in self.names[-2:]]
        if len(shapes) < 2 or len(shapes[0]) not in (2, 4) or shapes[1] != shapes[0][:1]:
            raise ValueError(f"weights.head=replace: {last} are not the last layer of a classifier")
        return Side(self.names[:-2], self.tensors)

    def shown(self, names: Collection[str]) -> str:
        """Some of the names, with shapes, for people."""
        return shorten([f"{name} {tuple(self.tensors[name].shape)}" for name in self.names if name in names])


def leaf(name: str) -> str | None:
    """The last part of a name where it is one that all use."""
    last = name.rpartition(".")[2]
    return last if last in LEAVES else None


def bare_shape(tensor: Tensor) -> tuple[int, ...]:
    """A shape without ones: (C, 1, 1) is (C,)."""
    return tuple(size for size in tensor.shape if size > 1)


def kind(name: str, tensor: Tensor) -> str:
    """What tensors with the same place have in common: the last part of the name, the shape without ones."""
    return f"{leaf(name)} {bare_shape(tensor)}"


def may_fit(source: str, target: str, *, theirs: Side, ours: Side) -> bool:
    """Whether a tensor of the file belongs to a place of the network, by the end of its name and its shape.

    Shapes may differ in ones, flattened kernels and the size of a table of offsets.
    """
    tensor, place = theirs.tensors[source], ours.tensors[target]
    if leaf(source) and leaf(target) and leaf(source) != leaf(target):
        return False
    flattened = place.ndim == 2 and tensor.ndim == 4 and tensor.flatten(1).shape == place.shape
    is_table = target.endswith(TABLE) and tensor.ndim == 2 and tensor.shape[1:] == place.shape[1:]
    square = is_table and math.isqrt(len(tensor)) ** 2 == len(tensor)
    return bare_shape(tensor) == bare_shape(place) or flattened or square


def fit(tensor: Tensor, place: Tensor) -> Tensor:
    """A tensor of the file in the shape of its place, a table of offsets resized: any shape -> that of `place`."""
    if tensor.numel() == place.numel():
        return tensor.reshape(place.shape)
    side = (math.isqrt(len(place)) + 1) // 2
    return resize_table(tensor, side, width=side)


def unmatched(theirs: Side, ours: Side) -> tuple[set[str], set[str]]:
    """Which tensors of either side are too many, by the longest runs of the same kinds."""
    kinds, our_kinds = ([kind(name, side.tensors[name]) for name in side.names] for side in (theirs, ours))
    extra, missing = set(theirs.names), set(ours.names)
    for at, there, size in SequenceMatcher(None, kinds, our_kinds, autojunk=False).get_matching_blocks():
        extra -= set(theirs.names[at : at + size])
        missing -= set(ours.names[there : there + size])
    return extra, missing


def hangs_on_image_size(tensor: Tensor, place: Tensor, *, is_first: bool) -> bool:
    """Whether shapes differ as those of networks for small and large images do: first kernels, inputs of matrices."""
    if is_first and tensor.ndim == place.ndim == 4:
        return tensor.shape[2:] != place.shape[2:]
    return tensor.ndim == place.ndim == 2 and len(tensor) == len(place) and tensor.shape[1] != place.shape[1]


def misfits(wrong: Sequence[tuple[str, str]], *, theirs: Side, ours: Side) -> str:
    """Which shapes differ, and what can be done about it."""
    parts = [f"{theirs.shown([source for source, _ in wrong])} for {ours.shown([target for _, target in wrong])}"]
    last = theirs.names[-2:]
    if any(source in last for source, _ in wrong):
        parts.append("weights.head=replace leaves out the last layer, for other classes")
    for source, target in wrong:
        tensor, place = theirs.tensors[source], ours.tensors[target]
        if source not in last and hangs_on_image_size(tensor, place, is_first=source == theirs.names[0]):
            small = "the network was built for small images, model.image_size=224 builds the published one"
            large = f"the file's network was built for small images, model.image_size={SMALL} builds such a one"
            parts.append(small if tensor.numel() > place.numel() else large)
            break
        if source == theirs.names[0] and tensor.ndim == place.ndim == 4 and tensor.shape[1] != place.shape[1]:
            parts.append("weights.stem=adapt changes the number of input channels")
    return "; ".join(parts)


def culprits(wrong: Sequence[tuple[str, str]], *, theirs: Side, ours: Side, layout: Layout) -> str:
    """Which tensors stand against a match: the few whose shapes differ in place, or else what one side has too many."""
    if layout is OURS:
        extra, missing = set(theirs.names) - set(ours.names), set(ours.names) - set(theirs.names)
    else:
        extra, missing = unmatched(theirs, ours)
    # Where a tensor more here and one less there shift all between them, the runs of equal kinds say which they are.
    if wrong and (not missing or len(wrong) <= len(missing)):
        return misfits(wrong, theirs=theirs, ours=ours)
    parts = [f"it has nothing for {ours.shown(missing)}"] if missing else []
    parts += [f"it has {theirs.shown(extra)}, for which there is no place"] if extra else []
    advice = "weights.skip=[NAME] names what may be left out, model.variant=NAME the network that the file is of"
    return f"{' and '.join(parts)}; {advice}"


def pair(theirs: Side, ours: Side, *, layout: Layout, path: Path) -> list[tuple[str, str]]:
    """The name in the file and the name in the network of each tensor.

    Raises: ValueError, naming the first culprits, unless the two sides match one by one.
    """
    in_place = theirs.names == ours.names if layout is OURS else len(theirs.names) == len(ours.names)
    pairs = list(zip(theirs.names, ours.names, strict=True)) if in_place else []
    wrong = [names for names in pairs if not may_fit(*names, theirs=theirs, ours=ours)]
    if in_place and not wrong:
        return pairs
    raise ValueError(f"{path} does not fit this network: {culprits(wrong, theirs=theirs, ours=ours, layout=layout)}")


def adapt_stem(theirs: Side, ours: Side) -> Side:
    """The file's first kernels with as many input channels as the network's.

    Shapes: (C_out, C_in, K, K) -> (C_out, channels, K, K).
    """
    if not theirs.names or not ours.names:
        return theirs
    kernels, wanted = theirs.tensors[theirs.names[0]].float(), ours.tensors[ours.names[0]]
    if kernels.ndim != 4 or wanted.ndim != 4 or kernels.shape[1] == wanted.shape[1]:
        return theirs
    have, channels = kernels.shape[1], wanted.shape[1]
    if channels == 1:
        adapted = kernels.sum(1, keepdim=True)
    else:
        adapted = kernels[:, [channel % have for channel in range(channels)]] * (have / channels)
    return Side(theirs.names, {**theirs.tensors, theirs.names[0]: adapted})


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


def is_ours(theirs: Tensors, ours: Tensors) -> bool:
    """Whether most names of the file are those of the network."""
    return 2 * len(theirs.keys() & ours.keys()) > len(theirs)


def is_ported(path: Path) -> bool:
    """Whether a file or its folder bears timm's name of a network ported from TensorFlow, which no tensor shows.

    A cache of downloads has the name two folders above, behind the owner's: `models--timm--tf_...`.
    """
    whole = path.absolute()
    cached = [part.rpartition("--")[2] for part in whole.parts if "--" in part]
    return any(name.startswith(PORTED) for name in (whole.name, whole.parent.name, *cached))


def expand(skip: Sequence[object], names: Sequence[str]) -> set[str]:
    """The names that are one of `skip`, or inside a module that is.

    Raises: ValueError for one that means nothing on either side.
    """
    skipped: set[str] = set()
    for wanted in map(str, skip):
        meant = {name for name in names if name == wanted or name.startswith(f"{wanted.removesuffix('.')}.")}
        if not meant or not wanted:
            raise ValueError(f"weights.skip={wanted} is no tensor and no module of the file or the network")
        skipped |= meant
    return skipped


def load_weights(
    net: nn.Module,
    path: Path,
    *,
    head: str = "keep",
    stem: str = "keep",
    skip: Sequence[object] = (),
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
    tensors = {name: tensor for name, tensor in file.tensors.items() if name not in skipped}
    layout = OURS if is_ours(tensors, own) else recognize(tensors) or UNKNOWN
    if layout.norm_eps is not None and is_ported(path):
        raise ValueError(f"weights={path}: timm's {PORTED} variants pad their images as TensorFlow does, ours do not")
    if not any(tensor.ndim == 0 for tensor in tensors.values()):
        skipped |= {name for name in own if name.endswith(COUNTER)}
    theirs = Side(sort(tensors, own, layout=layout, path=path), tensors)
    ours = Side([name for name in own if name not in skipped], own)
    if head == "replace":
        theirs, ours = theirs.without_last_layer(), ours.without_last_layer()
    if stem == "adapt":
        theirs = adapt_stem(theirs, ours)
    pairs = pair(theirs, ours, layout=layout, path=path)
    fitted = {target: fit(theirs.tensors[source], own[target]) for source, target in pairs}
    net.load_state_dict(fitted, strict=False)
    eps = norm_eps or file.norm_eps or layout.norm_eps
    set_batch_norm(net, eps=eps)
    return Loaded(
        names_of=layout.name,
        wrapper=file.wrapper,
        num_tensors=len(pairs),
        reshaped=tuple(source for source, target in pairs if file.tensors[source].shape != own[target].shape),
        left_out=tuple(name for name in file.tensors if name not in theirs.names),
        kept=tuple(name for name in own if name not in ours.names and not name.endswith(COUNTER)),
        norm_eps=eps if batch_norms(net) else None,
        image_size=file.image_size,
    )
