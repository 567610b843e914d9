"""Sources of images to pack. To add one: a function that returns a `Source`, and a YAML in `conf/source/`."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data import draws
from data.arguments import require
from data.shards import images

SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}


@dataclass(frozen=True)
class Item:
    """One image to pack: its key in the shard, its label, and its bytes or their path."""

    key: str
    label: int
    suffix: str
    path: Path | None = None
    encoded: bytes = b""

    def read(self) -> bytes:
        """Return the encoded image unchanged."""
        return self.encoded if self.path is None else self.path.read_bytes()


class Items(Protocol):
    """A sequence of items, such as a list."""

    def __len__(self) -> int: ...
    def __getitem__(self, place: int, /) -> Item: ...
    def __iter__(self) -> Iterator[Item]: ...


class ImageFiles:
    """Files in class folders, of which a hundred million fit in memory: each takes 12 bytes and its path.

    `paths` (N,) are below `root`, `labels` (N,) their classes. `copies` numbers, by path, those whose keys would be
    equal.
    """

    def __init__(
        self, root: Path, paths: pa.LargeBinaryArray, *, labels: NDArray[np.int32], copies: dict[bytes, int]
    ) -> None:
        self.root, self.paths, self.labels, self.copies = root, paths, labels, copies

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int, /) -> Item:
        encoded: bytes = self.paths[place].as_py()
        path, copy = os.fsdecode(encoded), self.copies.get(encoded, 1)
        key = key_of(encoded) if copy == 1 else f"{key_of(encoded)}-{copy}"
        return Item(key, int(self.labels[place]), path.rpartition(".")[2].lower(), self.root / path)

    def __iter__(self) -> Iterator[Item]:
        return (self[place] for place in range(len(self)))

    def select(self, places: NDArray[np.int64]) -> "ImageFiles":
        """Return the images at these places, in this order."""
        return ImageFiles(self.root, self.paths.take(pa.array(places)), labels=self.labels[places], copies=self.copies)


@dataclass(frozen=True)
class Source:
    """A data set to pack: name, classes in label order, items by split; `ignored` counts other files by suffix."""

    name: str
    classes: tuple[str, ...]
    splits: Mapping[str, Items]
    ignored: Counter[str] = field(default_factory=Counter)


def digits(name: str = "digits", *, val_fraction: float, seed: int) -> Source:
    """The 1,797 handwritten digits of scikit-learn, 8x8 pixels of 17 grey levels, as JPEGs of quality 100.

    The test half of Alpaydin & Kaynak 1998, "Optical recognition of handwritten digits".
    """
    from PIL import Image
    from sklearn.datasets import load_digits  # takes 1.5 s to import

    bunch = load_digits()
    items = []
    for number, (grey, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        pixels = np.round(grey * (255 / 16)).astype(np.uint8)  # (8, 8)
        encoded = images.to_jpeg(Image.fromarray(pixels), quality=100)
        items.append(Item(f"{label}/{number:04d}", int(label), "jpg", encoded=encoded))
    return Source(name, tuple("0123456789"), split_off(items, val_fraction=val_fraction, seed=seed))


def folder(root: Path | str, name: str, *, val_fraction: float, seed: int) -> Source:
    """Class folders of images, as torchvision's ImageFolder reads them, searched to any depth.

    `train/`, `val/` (or `validation/`, `valid/`) and `test/` below `root` are the splits, if `train/` is one of them or
    there is nothing else; otherwise `val_fraction` of each class is split off by `seed`.
    Raises: ValueError without the folder or classes, for a class without images or one that the first split lacks.
    """
    root = Path(root)
    require(root.is_dir(), "is not a folder", root=root)
    folders = _split_folders(root)
    if list(folders) == ["train"]:
        root, folders = folders["train"], {}
    ignored: Counter[str] = Counter()
    if "train" not in folders and len(folders) < len(_class_names(root)):
        folders = {}  # `val` or `test` is the name of a class
    classes = _class_names(next(iter(folders.values()), root))
    if folders:
        splits: Mapping[str, Items] = {
            split: _class_items(path, classes, ignored=ignored) for split, path in folders.items()
        }
    else:
        splits = split_off(_class_items(root, classes, ignored=ignored), val_fraction=val_fraction, seed=seed)
    return Source(name, classes, splits, ignored)


def split_off(items: Items, *, val_fraction: float, seed: int) -> dict[str, Items]:
    """Split this fraction of each class off, at least one image of two; 0 means no validation. Raises: ValueError."""
    require(0 <= val_fraction < 1, "must be at least 0 and less than 1", val_fraction=val_fraction)
    if val_fraction == 0:
        return {"train": items}
    labels, first, sizes = np.unique(labels_of(items), return_index=True, return_counts=True)  # (C,) each
    places = np.split(np.argsort(labels_of(items), kind="stable"), np.cumsum(sizes)[:-1])  # those of each class
    members: dict[str, list[NDArray[np.int64]]] = {"train": [], "val": []}
    for number in np.argsort(first).tolist():  # classes in the order of the items
        size, permutation = int(sizes[number]), draws.key(draws.SPLIT, seed, int(labels[number]))
        count = min(max(round(size * val_fraction), 1), size - 1)
        is_validation = draws.permute(np.arange(size), size, permutation=permutation) < count
        members["train"].append(places[number][~is_validation])
        members["val"].append(places[number][is_validation])
    return {split: select(items, np.concatenate(one)) for split, one in members.items()}


def key_of(path: bytes) -> str:
    """Return the key of a path: no suffix, no leading "__", which WebDataset reserves, no dot in the name."""
    parent, slash, name = os.fsdecode(path).rpartition(".")[0].removeprefix("__").rpartition("/")
    return parent + slash + name.replace(".", "_")


def labels_of(items: Items) -> NDArray[np.int32]:
    """Return the class of each item: (N,)."""
    return items.labels if isinstance(items, ImageFiles) else np.array([item.label for item in items], np.int32)


def select(items: Items, places: NDArray[np.int64]) -> Items:
    """Return the items at these places, in this order."""
    return items.select(places) if isinstance(items, ImageFiles) else [items[place] for place in places.tolist()]


def digest_of(items: Items) -> str:
    """Return the SHA-256 of the names and classes of all items."""
    if isinstance(items, ImageFiles):
        names = items.paths
    else:
        names = pa.array([os.fsencode(item.key) for item in items], pa.large_binary())
    digest = hashlib.sha256(labels_of(items).tobytes())
    for start in range(0, len(names), 65_536):
        digest.update(b"\0".join(names[start : start + 65_536].to_pylist()))
    return digest.hexdigest()


def _split_folders(root: Path) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for name, split in SPLIT_FOLDERS.items():
        if (root / name).is_dir():
            if split in folders:
                raise ValueError(f"{folders[split]} and {root / name} are both split {split}: keep one")
            folders[split] = root / name
    return folders


def _class_names(root: Path) -> tuple[str, ...]:
    names = [entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")]
    if not names:
        raise ValueError(f"{root} contains no class folders: put the images of each class into a folder named after it")
    return tuple(sorted(names))


def _class_items(root: Path, classes: tuple[str, ...], *, ignored: Counter[str]) -> ImageFiles:
    unknown = sorted(set(_class_names(root)) - set(classes))
    if unknown:
        raise ValueError(f"{root / unknown[0]} is a class that the first split does not have")
    paths: list[pa.Array] = []  # of each folder
    sizes, copies = np.zeros(len(classes), np.int64), dict[bytes, int]()
    keys: set[str] = set()
    is_prefixed = any(name.startswith("__") for name in classes)  # keys of another class may be equal
    for label, name in enumerate(classes):
        for found in _image_paths(root, name, ignored=ignored):
            if not is_prefixed:
                keys.clear()
            copies |= _number_copies(found, keys)
            paths.append(pa.array(found, pa.large_binary()))
            sizes[label] += len(found)
        if sizes[label] == 0:
            suffixes = ", ".join(images.SUFFIXES)
            raise ValueError(f"class {name} has no images: {root / name} contains no {suffixes} file")
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), sizes)
    return ImageFiles(root, pa.chunked_array(paths).combine_chunks(), labels=labels, copies=copies)


def _image_paths(root: Path, name: str, *, ignored: Counter[str]) -> Iterator[list[bytes]]:
    """Yield the images in each folder of a class, as paths below `root`."""
    for parent, folders, files in os.walk(root / name, onerror=_raise_unless_missing):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below, found = os.path.relpath(parent, root), []
        for file in sorted(files):
            suffix = os.path.splitext(file)[1].lower()
            if file.startswith("."):
                ignored["hidden"] += 1
            elif suffix[1:] in images.SUFFIXES:
                found.append(os.fsencode(os.path.join(below, file)))
            else:
                ignored[suffix or "suffixless"] += 1
        if found:
            yield found


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # a class missing from a split has its own message
        raise error


def _number_copies(paths: list[bytes], keys: set[str]) -> dict[bytes, int]:
    """Add the keys of paths to `keys`, and return the numbers of those whose key is there already."""
    copies = {}
    for path in paths:
        key = base = key_of(path)
        number = 1
        while key in keys:
            number += 1
            key = f"{base}-{number}"
        keys.add(key)
        if number > 1:
            copies[path] = number
    return copies
