"""Where images come from before they are packed: scikit-learn's digits, or class folders.

A source is a name, class names, and for each split a list of items; adding one
is a function that returns a `Source` and a YAML in `conf/source/`.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.loading import order
from data.shards import images

SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}


@dataclass(frozen=True)
class Item:
    """One image to pack: its key in the shard, its label, and where its bytes are."""

    key: str
    label: int
    suffix: str
    path: Path | None = None
    encoded: bytes = b""

    def read(self) -> bytes:
        """The encoded image, as it is on disk."""
        return self.encoded if self.path is None else self.path.read_bytes()


@dataclass(frozen=True)
class Source:
    """What to pack: the data set's name, its classes in the order of their labels, the items of each split.

    `ignored` counts files by suffix that are no images and stay behind.
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, list[Item]]
    ignored: Counter[str] = field(default_factory=Counter)


def digits(name: str = "digits", *, val_fraction: float, seed: int) -> Source:
    """The 1,797 handwritten digits that come with scikit-learn, 8x8 pixels of 17 grey levels, as JPEGs of quality 100.

    Alpaydin & Kaynak 1998, "Optical recognition of handwritten digits" (its test half).
    """
    from PIL import Image
    from sklearn.datasets import load_digits  # 1.5 s to import, and only this source needs it

    bunch = load_digits()
    items = []
    for number, (grey, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        pixels = np.round(grey * (255 / 16)).astype(np.uint8)  # (8, 8)
        encoded = images.to_jpeg(Image.fromarray(pixels), quality=100)
        items.append(Item(f"{label}/{number:04d}", int(label), "jpg", encoded=encoded))
    return Source(name, tuple("0123456789"), split_off(items, val_fraction=val_fraction, seed=seed))


def folder(root: Path | str, name: str, *, val_fraction: float, seed: int) -> Source:
    """Class folders of images, as torchvision's ImageFolder reads them, searched to any depth.

    With `train/` and `val/` (or `validation/`, `valid/`) or `test/` below `root`, these
    are the splits; otherwise `val_fraction` of each class is split off by `seed`.

    Raises: FileNotFoundError, ValueError when there is no folder, no class, a class
    without images, or a class of another split that `train/` does not have.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"source.root={root} is no folder")
    ignored: Counter[str] = Counter()
    parts: dict[str, Path] = {}
    for part, split in SPLIT_FOLDERS.items():
        if (root / part).is_dir():
            if split in parts:
                raise ValueError(f"{parts[split]} and {root / part} are both split {split}: keep one")
            parts[split] = root / part
    if list(parts) == ["train"]:  # nothing beside it: its classes are all there is
        root, parts = parts["train"], {}
    if "train" not in parts:
        classes = _class_names(root)
        items = _class_items(root, classes, ignored=ignored)
        return Source(name, classes, split_off(items, val_fraction=val_fraction, seed=seed), ignored)
    classes = _class_names(parts["train"])
    splits = {split: _class_items(path, classes, ignored=ignored) for split, path in parts.items()}
    return Source(name, classes, splits, ignored)


def split_off(items: list[Item], *, val_fraction: float, seed: int) -> dict[str, list[Item]]:
    """Split `val_fraction` of each class off for validation, at least one image of every class that has two.

    Raises: ValueError when the fraction is not between 0 and 1; 0 leaves no validation split.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must be at least 0 and less than 1")
    if val_fraction == 0:
        return {"train": items}
    members: dict[int, list[Item]] = {}
    for item in items:
        members.setdefault(item.label, []).append(item)
    splits: dict[str, list[Item]] = {"train": [], "val": []}
    for label, mine in members.items():
        count = min(max(round(len(mine) * val_fraction), 1), len(mine) - 1)
        places = order.permute(np.arange(len(mine)), len(mine), permutation=order.key(order.SPLIT, seed, label))
        for item, place in zip(mine, places, strict=True):
            splits["val" if place < count else "train"].append(item)
    return splits


def _class_names(root: Path) -> tuple[str, ...]:
    classes = tuple(
        sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    )
    if not classes:
        raise ValueError(f"{root} holds no class folders: put the images of each class into a folder named after it")
    return classes


def _class_items(root: Path, classes: tuple[str, ...], *, ignored: Counter[str]) -> list[Item]:
    strangers = sorted(set(_class_names(root)) - set(classes))
    if strangers:
        raise ValueError(f"{root / strangers[0]} is a class that the training split does not have")
    items: list[Item] = []
    used: set[str] = set()
    for label, name in enumerate(classes):
        before = len(items)
        for path in _image_paths(root / name, ignored):
            stem = path.relative_to(root).with_suffix("").as_posix()
            key = _unique_key(stem, used)
            items.append(Item(key, label, path.suffix[1:].lower(), path))
        if len(items) == before:
            raise ValueError(f"class {name} has no images: {root / name} holds no {', '.join(images.SUFFIXES)} file")
    return items


def _image_paths(folder: Path, ignored: Counter[str]) -> list[Path]:
    paths = []
    for parent, folders, files in os.walk(folder, onerror=_unreadable_folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(files):
            suffix = os.path.splitext(file)[1].lower()
            if file.startswith("."):
                ignored["hidden"] += 1
            elif suffix[1:] in images.SUFFIXES:
                paths.append(Path(parent, file))
            else:
                ignored[suffix or "suffixless"] += 1
    return paths


def _unreadable_folder(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # a class that a split does not have is named as such
        raise error


def _unique_key(stem: str, used: set[str]) -> str:
    """A key that no sample before it has, without dots after its last slash, where WebDataset cuts names, and
    without the two underscores at which it takes a file for its own."""
    parent, slash, name = stem.removeprefix("__").rpartition("/")
    key = wanted = parent + slash + name.replace(".", "_")
    number = 1
    while key in used:
        number += 1
        key = f"{wanted}-{number}"
    used.add(key)
    return key
