"""Load the tensors of a published file into a network.

Known names decide where a tensor belongs, otherwise the order of the file; shapes are checked either way. A tensor
without a match is an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from models.arguments import require
from models.attention import RelativeBias
from models.layers import batch_norms, set_batch_norm
from models.weights.files import SAFETENSORS, read, shorten
from models.weights.head import ClassNames, choose_last_layer, copy_rows
from models.weights.match import Side, Tensors, fit, match
from models.weights.names import OURS, UNKNOWN, Layout, recognize

COUNTER = "num_batches_tracked"  # of batch norms, the only tensors without a shape: not in old files, not needed
PORTED = "tf_"  # prefix of timm's names of networks ported from TensorFlow


@dataclass(frozen=True)
class LoadedWeights:
    """The origin of a file's tensors and their destinations."""

    layout: str  # publisher of the names
    wrapper: str | None  # key of the state dict in the file
    num_tensors: int
    reshaped: tuple[str, ...]  # names of the file
    left_out: tuple[str, ...]  # names of the file
    kept: tuple[str, ...]  # names of the network, which keep their initial values
    norm_eps: float | None  # of all batch norms; None without batch norms or where they keep theirs
    image_size: int | None  # of the file's network, if recorded
    head: str | None  # treatment of the last layer, where the classes decided

    @property
    def is_ours(self) -> bool:
        """Whether the file holds this project's names."""
        return self.layout == OURS.name

    def __str__(self) -> str:
        wrapped = f" in {self.wrapper}" if self.wrapper else ""
        matched = "matched by order" if self.layout == UNKNOWN.name else f"named as by {self.layout}"
        parts = [f"{self.num_tensors} tensors loaded{wrapped}, {matched}"]
        lists = {"reshaped": self.reshaped, "left out of the file": self.left_out, "newly initialised": self.kept}
        parts += [f"{label}: {shorten(names)}" for label, names in lists.items() if names]
        return "; ".join([*parts, *([f"batch norm eps {self.norm_eps:g}"] if self.norm_eps else [])])


def _expand(skip: Sequence[object], names: Sequence[str]) -> set[str]:
    """Return the names that are in `skip`, or inside a module that is. Raises: ValueError for an unknown one."""
    skipped: set[str] = set()
    for wanted in map(str, skip):
        matches = {name for name in names if name == wanted or name.startswith(f"{wanted.removesuffix('.')}.")}
        require(bool(matches and wanted), "matches no tensor or module of the file or the network", skip=wanted)
        skipped |= matches
    return skipped


def _is_ported(path: Path) -> bool:
    """Return whether a file or its folder has timm's name of a network ported from TensorFlow; no tensor shows it."""
    path = path.absolute()
    # Download caches have the name two folders above, after the owner's: `models--timm--tf_...`.
    cached = [part.rpartition("--")[2] for part in path.parts if "--" in part]
    return any(name.startswith(PORTED) for name in (path.name, path.parent.name, *cached))


def _sort(theirs: Tensors, ours: Tensors, *, layout: Layout, path: Path) -> list[str]:
    """Sort the names of the file into the network's order. Raises: ValueError when nothing decides it."""
    if layout is OURS:
        return [*(name for name in ours if name in theirs), *(name for name in theirs if name not in ours)]
    if layout is not UNKNOWN:
        return layout.sort(theirs)
    names = list(theirs)
    if path.suffix == SAFETENSORS:
        raise ValueError(f"{path} has names of no known publisher ({shorten(names)}), and {SAFETENSORS} keeps no order")
    return names


def _adapt_stem(theirs: Side, ours: Side) -> Side:
    """Return the first kernels, (C_out, C_in, K, K), with the network's number of input channels."""
    if not theirs.names or not ours.names:
        return theirs
    kernels, place = theirs.tensors[theirs.names[0]].float(), ours.tensors[ours.names[0]]
    if kernels.ndim != 4 or place.ndim != 4 or kernels.shape[1] == place.shape[1]:
        return theirs
    in_channels, channels = kernels.shape[1], place.shape[1]
    repeated = [channel % in_channels for channel in range(channels)]
    adapted = kernels.sum(1, keepdim=True) if channels == 1 else kernels[:, repeated] * (in_channels / channels)
    return theirs._replace(tensors={**theirs.tensors, theirs.names[0]: adapted})


def load_weights(
    net: nn.Module,
    path: Path,
    *,
    head: str | ClassNames = "keep",
    stem: str = "keep",
    skip: Sequence[object] = (),
    norm_eps: float | None = None,
) -> LoadedWeights:
    """Load a file by torchvision, timm, Facebook's ConvNeXt or this project into `net`.

    `head="replace"` leaves out the last linear layer, for other classes; with class names, its rows are copied where
    file and network have a class of that name, and without them it is kept if the numbers of classes are equal.
    `stem="adapt"` fits the first convolution to other input channels: the sum of its kernels for one channel, else
    its kernels in turn, scaled to the same total.
    `skip` names tensors or modules, of either side, that may be left out. `norm_eps` replaces the publisher's.
    Raises: FileNotFoundError; ValueError when the file cannot be read, or a tensor of either side has no match.
    """
    for name, value, other in (("head", head, "replace"), ("stem", stem, "adapt")):
        is_given = isinstance(value, ClassNames) or value in ("keep", other)
        require(is_given, f"must be keep or {other}", **{name: value})
    file, own = read(path), net.state_dict()
    skipped = _expand(skip, [*file.tensors, *own])
    tensors = {name: tensor for name, tensor in file.tensors.items() if name not in skipped}
    is_ours = 2 * len(tensors.keys() & own.keys()) > len(tensors)
    layout = OURS if is_ours else recognize(tensors) or UNKNOWN
    if layout.norm_eps is not None and _is_ported(path):
        raise ValueError(f"{path}: timm's {PORTED} variants pad their images as TensorFlow does, ours do not")
    if not any(tensor.ndim == 0 for tensor in tensors.values()):
        skipped |= {name for name in own if name.endswith(COUNTER)}
    theirs = Side(_sort(tensors, own, layout=layout, path=path), tensors)
    tables = frozenset(f"{name}.table" for name, layer in net.named_modules() if isinstance(layer, RelativeBias))
    ours = Side([name for name in own if name not in skipped], own, tables)
    last, complete = choose_last_layer(head, theirs, ours=ours), (theirs, ours)
    if not last.is_kept:
        theirs, ours = theirs.without_last_layer(), ours.without_last_layer()
    if stem == "adapt":
        theirs = _adapt_stem(theirs, ours)
    pairs = match(theirs, ours, layout=layout, path=path)
    net.load_state_dict({target: fit(theirs.tensors[source], own[target]) for source, target in pairs}, strict=False)
    if last.rows:
        copy_rows(last.rows, complete[0], ours=complete[1])
    eps = norm_eps or file.norm_eps or layout.norm_eps
    set_batch_norm(net, eps=eps)
    return LoadedWeights(
        layout=layout.name,
        wrapper=file.wrapper,
        num_tensors=len(pairs),
        reshaped=tuple(source for source, target in pairs if file.tensors[source].shape != own[target].shape),
        left_out=tuple(name for name in file.tensors if name not in theirs.names),
        kept=tuple(name for name in own if name not in ours.names and not name.endswith(COUNTER)),
        norm_eps=eps if batch_norms(net) else None,
        image_size=file.image_size,
        head=last.description,
    )
