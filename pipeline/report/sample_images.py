"""Photographs on which a network is measured: a file, a folder's, or the two that come with scikit-learn."""

from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from data.shards.images import FORMATS, SUFFIXES, UNREADABLE

# ImageNet's colour statistics, with which most published networks were trained.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MIN_CROP = 0.5  # side of the smallest crop, as a fraction of the image's shorter side
NUM_NAMED = 3  # files that a description names


class SampleImages(NamedTuple):
    """Crops of photographs, uint8 (N, H, W, 3), and a description of where they come from."""

    pixels: NDArray[np.uint8]
    description: str


def sample_images(source: Path | None, count: int, *, size: tuple[int, int], seed: int = 0) -> SampleImages:
    """Return H x W random crops of a photograph, or a folder's in turn. Raises: FileNotFoundError, ValueError."""
    generator = np.random.default_rng(seed)
    files = _image_files(source)
    if len(files) > count:  # spread over the folder, which may be sorted by class
        files = [files[place] for place in sorted(generator.permutation(len(files))[:count])]
    crops = [_crop(_read(files[number % len(files)]), size, generator=generator) for number in range(count)]
    names = ", ".join(file.name for file in files) if len(files) <= NUM_NAMED else f"{len(files)} images in {source}"
    return SampleImages(np.stack(crops), f"{count} {'crop' if count == 1 else 'crops'} of {names}")


def to_network_input(pixels: NDArray[np.uint8], *, channels: int) -> Tensor:
    """Normalise: uint8 (N, H, W, 3) -> float32 (N, channels, H, W), copies of the grey image if not 3 channels."""
    scaled = torch.from_numpy(pixels).float() / 255
    images = ((scaled - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    return images if channels == 3 else images.mean(1, keepdim=True).expand(-1, channels, -1, -1).contiguous()


def _image_files(source: Path | None) -> list[Path]:
    if source is None:
        # Importing sklearn would take a second.
        source = Path(str(distribution("scikit-learn").locate_file("sklearn/datasets/images")))
    paths = [source] if source.is_file() else source.rglob("*")
    files = sorted(path for path in paths if path.suffix.lower().removeprefix(".") in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"photographs={source}: there is no image, {', '.join(SUFFIXES)}")
    return files


def _read(file: Path) -> Image.Image:
    try:
        with Image.open(file, formats=FORMATS) as image:  # whatever its suffix: PIL gives EPS to Ghostscript
            return ImageOps.exif_transpose(image).convert("RGB")
    except UNREADABLE as error:
        raise ValueError(f"photographs: {file} cannot be read: {error}") from error


def _crop(image: Image.Image, size: tuple[int, int], *, generator: np.random.Generator) -> NDArray[np.uint8]:
    height, width = size
    scale = generator.uniform(MIN_CROP, 1) * min(image.width / width, image.height / height)
    left = generator.uniform(0, image.width - scale * width)
    top = generator.uniform(0, image.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box))
