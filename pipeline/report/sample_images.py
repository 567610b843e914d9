"""Photographs to look at networks with: one, those of a folder, or the two that come with scikit-learn."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from data.shards.images import SUFFIXES, UNREADABLE

# Of ImageNet's colours, as most published networks were trained.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALLEST = 0.5  # of the shorter side: how small a crop may be
NAMED = 3  # files that are told by name


class Photographs(NamedTuple):
    """Crops of images, uint8 (N, H, W, 3), and what they are in words."""

    pixels: NDArray[np.uint8]
    said: str


def photographs(source: Path | None, count: int, *, size: tuple[int, int], seed: int = 0) -> Photographs:
    """Random crops of an image, or of some of a folder's in turn, scaled to H x W pixels.

    Raises: FileNotFoundError when there are none; ValueError for one that cannot be read.
    """
    generator = np.random.default_rng(seed)
    files = _files(source)
    if len(files) > count:  # of a folder of classes not the first alone
        files = [files[place] for place in sorted(generator.permutation(len(files))[:count])]
    crops = [_crop(_read(files[number % len(files)]), size, generator=generator) for number in range(count)]
    names = ", ".join(file.name for file in files) if len(files) <= NAMED else f"{len(files)} images in {source}"
    return Photographs(np.stack(crops), f"{count} {'crop' if count == 1 else 'crops'} of {names}")


def as_images(pixels: NDArray[np.uint8], *, channels: int) -> Tensor:
    """Photographs as a network takes them: normalised, grey or in as many copies as it has channels.

    Shapes: uint8 (N, H, W, 3) -> float32 (N, channels, H, W).
    """
    scaled = torch.from_numpy(pixels).float() / 255
    images = ((scaled - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    return images if channels == 3 else images.mean(1, keepdim=True).expand(-1, channels, -1, -1).contiguous()


def _files(source: Path | None) -> list[Path]:
    if source is None:
        spec = find_spec("sklearn")  # without importing it, which takes a second
        assert spec is not None
        assert spec.submodule_search_locations is not None
        source = Path(spec.submodule_search_locations[0], "datasets", "images")
    found = [source] if source.is_file() else source.rglob("*")
    files = sorted(path for path in found if path.suffix.lower().removeprefix(".") in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"photographs={source}: there is no image, {', '.join(SUFFIXES)}")
    return files


def _read(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UNREADABLE as error:
        raise ValueError(f"photographs: {file} cannot be read: {error}") from error


def _crop(image: Image.Image, size: tuple[int, int], *, generator: np.random.Generator) -> NDArray[np.uint8]:
    height, width = size
    scale = generator.uniform(SMALLEST, 1) * min(image.width / width, image.height / height)
    left = generator.uniform(0, image.width - scale * width)
    top = generator.uniform(0, image.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box))
