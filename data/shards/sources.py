"""Sources of images to pack. To add one: a function that returns a `Source`, and a YAML in `conf/source/`."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

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


@dataclass(frozen=True)
class Source:
    """A data set to pack: name, classes in label order, items by split; `ignored` counts other files by suffix."""

    name: str
    classes: tuple[str, ...]
    splits: dict[str, list[Item]]
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
        splits = {split: _class_items(path, classes, ignored=ignored) for split, path in folders.items()}
    else:
        splits = split_off(_class_items(root, classes, ignored=ignored), val_fraction=val_fraction, seed=seed)
    return Source(name, classes, splits, ignored)


def split_off(items: list[Item], *, val_fraction: float, seed: int) -> dict[str, list[Item]]:
    """Split this fraction of each class off, at least one image of two; 0 means no validation. Raises: ValueError."""
    require(0 <= val_fraction < 1, "must be at least 0 and less than 1", val_fraction=val_fraction)
    if val_fraction == 0:
        return {"train": items}
    by_label: dict[int, list[Item]] = {}
    for item in items:
        by_label.setdefault(item.label, []).append(item)
    splits: dict[str, list[Item]] = {"train": [], "val": []}
    for label, members in by_label.items():
        count = min(max(round(len(members) * val_fraction), 1), len(members) - 1)
        places = draws.permute(np.arange(len(members)), len(members), permutation=draws.key(draws.SPLIT, seed, label))
        for item, place in zip(members, places, strict=True):
            splits["val" if place < count else "train"].append(item)
    return splits


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


def _class_items(root: Path, classes: tuple[str, ...], *, ignored: Counter[str]) -> list[Item]:
    unknown = sorted(set(_class_names(root)) - set(classes))
    if unknown:
        raise ValueError(f"{root / unknown[0]} is a class that the first split does not have")
    items: list[Item] = []
    keys: set[str] = set()
    for label, name in enumerate(classes):
        paths = _image_paths(root / name, ignored)
        if not paths:
            raise ValueError(f"class {name} has no images: {root / name} contains no {', '.join(images.SUFFIXES)} file")
        for path in paths:
            key = _unique_key(path.relative_to(root).with_suffix("").as_posix(), keys)
            items.append(Item(key, label, path.suffix[1:].lower(), path))
    return items


def _image_paths(folder: Path, ignored: Counter[str]) -> list[Path]:
    paths = []
    for parent, folders, files in os.walk(folder, onerror=_raise_unless_missing):
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


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # a class missing from a split has its own message
        raise error


def _unique_key(stem: str, used: set[str]) -> str:
    """Make an unused key: no leading "__", which WebDataset reserves, and no dot in the name, where it cuts."""
    parent, slash, name = stem.removeprefix("__").rpartition("/")
    key = base = parent + slash + name.replace(".", "_")
    number = 1
    while key in used:
        number += 1
        key = f"{base}-{number}"
    used.add(key)
    return key
