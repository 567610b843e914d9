"""Photographs to look at networks with: those of a folder, or the two that come with scikit-learn."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data.images import SUFFIXES

# Of ImageNet's colours, as most published networks were trained.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALLEST = 0.5  # of the shorter side: how small a crop may be


def photographs(folder: Path | None, count: int, *, size: tuple[int, int], seed: int = 0) -> NDArray[np.uint8]:
    """Random crops of a folder's images in turn, scaled to H x W pixels: uint8 (count, H, W, 3).

    Raises: FileNotFoundError when there are none.
    """
    files = _files(folder)
    generator = np.random.default_rng(seed)
    height, width = size
    crops = []
    for number in range(count):
        with Image.open(files[number % len(files)]) as image:
            scale = generator.uniform(SMALLEST, 1) * min(image.width / width, image.height / height)
            left = generator.uniform(0, image.width - scale * width)
            top = generator.uniform(0, image.height - scale * height)
            box = (left, top, left + scale * width, top + scale * height)
            crops.append(np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR, box)))
    return np.stack(crops)


def as_images(pixels: NDArray[np.uint8], *, channels: int) -> Tensor:
    """Photographs as a network takes them: normalised, grey or in as many copies as it has channels.

    Shapes: uint8 (N, H, W, 3) -> float32 (N, channels, H, W).
    """
    scaled = torch.from_numpy(pixels).float() / 255
    images = ((scaled - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    return images if channels == 3 else images.mean(1, keepdim=True).expand(-1, channels, -1, -1).contiguous()


def _files(folder: Path | None) -> list[Path]:
    if folder is None:
        spec = find_spec("sklearn")  # without importing it, which takes a second
        assert spec is not None
        assert spec.submodule_search_locations is not None
        folder = Path(spec.submodule_search_locations[0], "datasets", "images")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower().removeprefix(".") in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"photographs={folder}: there is no image, {', '.join(SUFFIXES)}")
    return files
