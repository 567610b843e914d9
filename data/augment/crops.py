"""The crop of each image in a batch, computed from the index before any pixel is decoded.

Constants and rounding are those of torchvision's reference presets for classification: RandomResizedCrop and
RandomHorizontalFlip in training, Resize and CenterCrop in evaluation.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from data.arguments import require
from data.draws import Samples, uniform

ATTEMPTS = 10  # as in torchvision's RandomResizedCrop and RandomErasing
DRAWS = 4 * ATTEMPTS + 1  # area, ratio, top and left of each attempt, then the flip


class CropWindows(NamedTuple):
    """The rectangle to decode of each image, and its part that becomes the output; rows before columns, contiguous.

    The part is [roi_start, roi_end) in pixels of the rectangle, None all of it. Pixels around it feed the filter.
    """

    anchor: NDArray[np.int32]  # (N, 2) first row and column to decode
    shape: NDArray[np.int32]  # (N, 2) rows and columns to decode
    mirror: NDArray[np.int32]  # (N,) 1 flips left and right
    roi_start: NDArray[np.float32] | None = None  # (N, 2)
    roi_end: NDArray[np.float32] | None = None  # (N, 2)


@runtime_checkable
class CropPolicy(Protocol):
    """Chooses the crop of each image. To add one: a class with these members and a YAML in `conf/augment/`."""

    @property
    def image_size(self) -> int:
        """Side of the square output in pixels."""

    @property
    def has_margin(self) -> bool:
        """Whether `crops` sets roi_start and roi_end."""

    def crops(self, sizes: NDArray[np.int64], samples: Samples, *, seed: int, epoch: int) -> CropWindows:
        """Choose one crop per image. Shapes: sizes (N, 2) height and width, samples (N,) -> arrays of (N, ...)."""


@dataclass(frozen=True)
class TrainingCrop:
    """Random crop with a share of the area in `scale`, width / height in `ratio`, mirrored with probability `flip`.

    Szegedy et al. 2015, section 6. Raises: ValueError for an invalid range or probability.
    """

    image_size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    has_margin = False

    def __post_init__(self) -> None:
        require(self.image_size >= 1, "must be at least 1 pixel", image_size=self.image_size)
        for name, value in (("scale", self.scale), ("ratio", self.ratio)):
            require(len(value) == 2, "must be a range of two numbers", **{name: list(value)})
        scale, ratio = list(self.scale), list(self.ratio)
        require(0 < scale[0] <= scale[1] <= 1, "must rise from above 0 to at most 1", scale=scale)
        require(0 < ratio[0] <= ratio[1], "must rise from above 0", ratio=ratio)
        require(0 <= self.flip <= 1, "must be a probability: 0 to 1", flip=self.flip)

    def crops(self, sizes: NDArray[np.int64], samples: Samples, *, seed: int, epoch: int) -> CropWindows:
        """Draw one crop per image, a function of (seed, epoch, sample) alone."""
        draws = uniform(samples, DRAWS, seed=seed, epoch=epoch)  # (N, DRAWS)
        anchor, shape = random_resized_crop(sizes, draws[:, :-1], scale=self.scale, ratio=self.ratio)
        mirror = (draws[:, -1] < self.flip).astype(np.int32)
        return CropWindows(anchor.astype(np.int32), shape.astype(np.int32), mirror)


@dataclass(frozen=True)
class EvaluationCrop:
    """Central square of each image after a resize of its shorter side to image_size / crop_fraction.

    224 and 0.875 are torchvision's Resize(256), CenterCrop(224). Raises: ValueError for a fraction outside (0, 1].
    """

    image_size: int
    crop_fraction: float = 0.875

    has_margin = True

    def __post_init__(self) -> None:
        require(self.image_size >= 1, "must be at least 1 pixel", image_size=self.image_size)
        require(0 < self.crop_fraction <= 1, "must be above 0 and at most 1", crop_fraction=self.crop_fraction)

    def crops(self, sizes: NDArray[np.int64], samples: Samples, *, seed: int, epoch: int) -> CropWindows:
        """Return the central crop of each image; samples, seed and epoch do not matter.

        Only the crop and the reach of the resize filter are decoded, which gives the same pixels.
        """
        # (N, 2), torchvision truncates the longer side
        resized = round(self.image_size / self.crop_fraction) * sizes // sizes.min(axis=1, keepdims=True)
        corner = np.rint((resized - self.image_size) / 2)  # Python's rounding, as torchvision's
        pixels = sizes / resized  # (N, 2) input pixels per output pixel
        start, end = corner * pixels, (corner + self.image_size) * pixels
        support = np.ceil(np.maximum(pixels, 1)) + 1  # reach of the triangular filter
        anchor = np.maximum(np.floor(start - support), 0)
        shape = (np.minimum(np.ceil(end + support), sizes) - anchor).astype(np.int32)
        roi_start, roi_end = (start - anchor).astype(np.float32), (end - anchor).astype(np.float32)
        return CropWindows(anchor.astype(np.int32), shape, np.zeros(len(sizes), np.int32), roi_start, roi_end)


class Rectangles(NamedTuple):
    """Rectangles in images, rows before columns; only those count that `fits`."""

    anchor: NDArray[np.int64]  # (N, 2) first row and column
    shape: NDArray[np.int64]  # (N, 2) rows and columns
    fits: NDArray[np.bool_]  # (N,)


def draw_rectangles(
    sizes: NDArray[np.int64],
    draws: NDArray[np.float64],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    largest: NDArray[np.int64],
) -> Rectangles:
    """Draw a rectangle per image, with a share of the area in `scale` and width / height in `ratio`, as torchvision.

    The first of ten attempts counts that is at most as large as `largest`.
    Shapes: sizes and largest (N, 2) height and width, draws (N, 40) in [0, 1).
    """
    area_draw, ratio_draw, top_draw, left_draw = draws.reshape(len(draws), 4, ATTEMPTS).transpose(1, 0, 2)
    area = sizes.prod(axis=1)[:, None] * (scale[0] + area_draw * (scale[1] - scale[0]))  # (N, attempts)
    aspect = np.exp(np.log(ratio[0]) + ratio_draw * (np.log(ratio[1]) - np.log(ratio[0])))
    shape = np.stack([np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))], axis=2).astype(np.int64)
    fits = ((shape > 0) & (shape <= largest[:, None])).all(axis=2)  # (N, attempts)
    image, attempt = np.arange(len(sizes)), fits.argmax(axis=1)
    chosen = shape[image, attempt]  # (N, 2)
    position = np.stack([top_draw[image, attempt], left_draw[image, attempt]], axis=1)
    anchor = np.floor(position * (sizes - chosen + 1)).astype(np.int64)
    return Rectangles(anchor, chosen, np.any(fits, axis=1))


def random_resized_crop(
    sizes: NDArray[np.int64], draws: NDArray[np.float64], *, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Compute torchvision's RandomResizedCrop: sizes (N, 2), draws (N, 40) in [0, 1) -> anchors and shapes (N, 2)."""
    found = draw_rectangles(sizes, draws, scale=scale, ratio=ratio, largest=sizes)
    largest, fits = _largest_within(sizes, ratio), found.fits[:, None]  # otherwise the largest central crop
    return np.where(fits, found.anchor, (sizes - largest) // 2), np.where(fits, found.shape, largest)


def _largest_within(sizes: NDArray[np.int64], ratio: tuple[float, float]) -> NDArray[np.int64]:
    height, width = sizes[:, 0], sizes[:, 1]
    aspect = width / height
    fitted_height = np.where(aspect < ratio[0], np.rint(width / ratio[0]), height)
    fitted_width = np.where(aspect > ratio[1], np.rint(height * ratio[1]), width)
    return np.stack([fitted_height, fitted_width], axis=1).astype(np.int64)  # (N, 2)
