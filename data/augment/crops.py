"""The crop of each image in a batch, computed from the index before any pixel is decoded.

Constants and rounding are those of torchvision's reference presets for classification: RandomResizedCrop and
RandomHorizontalFlip in training, Resize and CenterCrop in evaluation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from data.arguments import require, require_colour, require_probability, require_ranges
from data.draws import Samples, uniform

ImageSize = int | Sequence[int]  # side of a square in pixels, or height and width
Levels = tuple[int, int, int]
MEAN_COLOUR: Levels = (124, 116, 104)  # of ImageNet
ATTEMPTS = 10  # as in torchvision's RandomResizedCrop and RandomErasing
DRAWS = 4 * ATTEMPTS + 1  # area, ratio, top and left of each attempt, then the flip


class Fit(StrEnum):
    """How an image, or in training a random crop of it, becomes the output: cut, padded, or squashed to its shape."""

    CROP = "crop"
    PAD = "pad"
    SQUASH = "squash"


class CropWindows(NamedTuple):
    """The rectangle to decode of each image, and its part that becomes the output; rows before columns, contiguous.

    The part is [roi_start, roi_end) in pixels of the rectangle, None all of it. Pixels around it feed the filter. With
    `resized` the part becomes so many rows and columns of the output, from `offset` on; None: all of them.
    """

    anchor: NDArray[np.int32]  # (N, 2) first row and column to decode
    shape: NDArray[np.int32]  # (N, 2) rows and columns to decode
    mirror: NDArray[np.int32]  # (N,) 1 flips left and right
    roi_start: NDArray[np.float32] | None = None  # (N, 2)
    roi_end: NDArray[np.float32] | None = None  # (N, 2)
    resized: NDArray[np.float32] | None = None  # (N, 2)
    offset: NDArray[np.int32] | None = None  # (N, 2)


@runtime_checkable
class CropPolicy(Protocol):
    """Chooses the crop of each image. To add one: a class with these members and a YAML in `conf/augment/`.

    One whose crops have an `offset` may have `fill`, the levels of the padding; without it that is ImageNet's mean.
    """

    @property
    def image_size(self) -> ImageSize:
        """Side of a square output in pixels, or height and width."""

    def crops(self, sizes: NDArray[np.int64], samples: Samples, *, seed: int, epoch: int) -> CropWindows:
        """Choose one crop per image; whether an array is None does not depend on the images.

        Shapes: sizes (N, 2) height and width, samples (N,) -> arrays of (N, ...).
        """


def height_and_width(image_size: ImageSize) -> tuple[int, int]:
    """Return both sides of a size in pixels. Raises: ValueError for anything that is none."""
    sides = list(image_size) if isinstance(image_size, Sequence) else [image_size, image_size]
    is_size = len(sides) == 2 and all(type(side) is int and side >= 1 for side in sides)  # no bool
    require(is_size, "must be a number of pixels of at least 1, or [HEIGHT,WIDTH]", image_size=image_size)
    return sides[0], sides[1]


def describe_size(image_size: ImageSize) -> str:
    """Return a size in words: 224, or 128x256 for height and width."""
    height, width = height_and_width(image_size)
    return str(height) if height == width else f"{height}x{width}"


@dataclass(frozen=True)
class TrainingCrop:
    """Random crop with a share of the area in `scale`, mirrored with probability `flip`.

    Szegedy et al. 2015, section 6. The ratio of its width and height is drawn from `ratio`, relative to the output's
    with fit="crop", else relative to the image's. With fit="pad" it keeps that ratio, and the rest of the output has
    the levels `fill`; otherwise it is squashed to the output's shape.
    Raises: ValueError for an invalid size, fit, range or probability.
    """

    image_size: ImageSize
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    fit: str = Fit.CROP
    fill: Sequence[int] = MEAN_COLOUR

    def __post_init__(self) -> None:
        _check_output(self.image_size, self.fit, fill=self.fill)
        require_ranges(scale=self.scale, ratio=self.ratio)
        require_probability(flip=self.flip)

    def crops(self, sizes: NDArray[np.int64], samples: Samples, *, seed: int, epoch: int) -> CropWindows:
        """Draw one crop per image, a function of (seed, epoch, sample) alone."""
        draws = uniform(samples, DRAWS, seed=seed, epoch=epoch)  # (N, DRAWS)
        output = np.array(height_and_width(self.image_size))
        shapes = output[None] if self.fit == Fit.CROP else sizes  # (1 or N, 2)
        anchor, shape = random_resized_crop(
            sizes, draws[:, :-1], scale=self.scale, ratio=self.ratio, relative_to=shapes[:, 1] / shapes[:, 0]
        )
        mirror = (draws[:, -1] < self.flip).astype(np.int32)
        crops = CropWindows(anchor.astype(np.int32), shape.astype(np.int32), mirror)
        if self.fit != Fit.PAD:
            return crops
        resized = _fit_within(output, shape)
        offset = np.rint((output - resized) / 2)
        return crops._replace(resized=resized.astype(np.float32), offset=offset.astype(np.int32))


@dataclass(frozen=True)
class EvaluationCrop:
    """Centre of each image after a resize that makes it as large as `image_size` / `crop_fraction`.

    With fit="crop" no side is shorter than that: 224 and 0.875 are torchvision's Resize(256), CenterCrop(224). With
    "pad" no side is longer, and the output has the levels `fill` around it; with "squash" both sides are as long.
    Raises: ValueError for an invalid size or fit, or a fraction outside (0, 1].
    """

    image_size: ImageSize
    crop_fraction: float = 0.875
    fit: str = Fit.CROP
    fill: Sequence[int] = MEAN_COLOUR

    def __post_init__(self) -> None:
        _check_output(self.image_size, self.fit, fill=self.fill)
        require(0 < self.crop_fraction <= 1, "must be above 0 and at most 1", crop_fraction=self.crop_fraction)

    @property
    def frame(self) -> tuple[int, int]:
        """Height and width in pixels to which images are resized."""
        height, width = height_and_width(self.image_size)
        return round(height / self.crop_fraction), round(width / self.crop_fraction)

    def crops(self, sizes: NDArray[np.int64], samples: Samples, *, seed: int, epoch: int) -> CropWindows:
        """Return the central crop of each image; samples, seed and epoch do not matter.

        Only the crop and the reach of the resize filter are decoded, which gives the same pixels.
        """
        output = np.array(height_and_width(self.image_size))
        resized = self._resize(sizes)
        taken = np.minimum(resized, output)
        corner = np.rint((resized - taken) / 2)  # Python's rounding, as torchvision's
        pixels = sizes / resized  # (N, 2) input pixels per output pixel
        start, end = corner * pixels, (corner + taken) * pixels
        support = np.ceil(np.maximum(pixels, 1)) + 1  # reach of the triangular filter
        anchor = np.maximum(np.floor(start - support), 0)
        shape = (np.minimum(np.ceil(end + support), sizes) - anchor).astype(np.int32)
        roi_start, roi_end = (start - anchor).astype(np.float32), (end - anchor).astype(np.float32)
        crops = CropWindows(anchor.astype(np.int32), shape, np.zeros(len(sizes), np.int32), roi_start, roi_end)
        if self.fit != Fit.PAD:
            return crops
        offset = np.rint((output - taken) / 2)
        return crops._replace(resized=taken.astype(np.float32), offset=offset.astype(np.int32))

    def _resize(self, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sizes of the images after the resize: (N, 2) -> (N, 2)."""
        frame = np.array(self.frame)
        if self.fit == Fit.SQUASH:
            return np.broadcast_to(frame, sizes.shape)
        if self.fit == Fit.PAD:
            return _fit_within(frame, sizes)
        tight = (frame / sizes).argmax(axis=1)[:, None]  # (N, 1) the axis that needs the most enlarging
        covering: NDArray[np.int64] = frame[tight] * sizes // np.take_along_axis(sizes, tight, axis=1)
        return covering  # torchvision too truncates the other side


def _check_output(image_size: ImageSize, fit: str, *, fill: Sequence[int]) -> None:
    height_and_width(image_size)
    require(fit in list(Fit), f"is not one of {', '.join(Fit)}", fit=fit)
    require_colour(fill=fill)


def _fit_within(frame: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the largest sizes of the same shape within a frame: (2,), (N, 2) -> (N, 2)."""
    tight = (frame / sizes).argmin(axis=1)[:, None]  # (N, 1)
    fitted: NDArray[np.int64] = frame[tight] * sizes // np.take_along_axis(sizes, tight, axis=1)
    return np.maximum(fitted, 1)


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
    relative_to: NDArray[np.float64] | float = 1.0,
) -> Rectangles:
    """Draw a rectangle per image, with a share of the area in `scale` and width / height in `ratio`, as torchvision.

    The first of ten attempts counts that is at most as large as `largest`. The ratio is multiplied by `relative_to`.
    Shapes: sizes and largest (N, 2) height and width, draws (N, 40) in [0, 1), relative_to (N,) or (1,).
    """
    area_draw, ratio_draw, top_draw, left_draw = draws.reshape(len(draws), 4, ATTEMPTS).transpose(1, 0, 2)
    area = sizes.prod(axis=1)[:, None] * (scale[0] + area_draw * (scale[1] - scale[0]))  # (N, attempts)
    aspect = np.exp(np.log(ratio[0]) + ratio_draw * (np.log(ratio[1]) - np.log(ratio[0])))
    aspect = aspect * np.atleast_1d(relative_to)[:, None]
    shape = np.stack([np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))], axis=2).astype(np.int64)
    fits = ((shape > 0) & (shape <= largest[:, None])).all(axis=2)  # (N, attempts)
    image, attempt = np.arange(len(sizes)), fits.argmax(axis=1)
    chosen = shape[image, attempt]  # (N, 2)
    position = np.stack([top_draw[image, attempt], left_draw[image, attempt]], axis=1)
    anchor = np.floor(position * (sizes - chosen + 1)).astype(np.int64)
    return Rectangles(anchor, chosen, np.any(fits, axis=1))


def random_resized_crop(
    sizes: NDArray[np.int64],
    draws: NDArray[np.float64],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    relative_to: NDArray[np.float64] | float = 1.0,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Compute torchvision's RandomResizedCrop: sizes (N, 2), draws (N, 40) in [0, 1) -> anchors and shapes (N, 2).

    The ratio of width and height is multiplied by `relative_to`, (N,) or (1,).
    """
    found = draw_rectangles(sizes, draws, scale=scale, ratio=ratio, largest=sizes, relative_to=relative_to)
    largest, fits = _largest_within(sizes, ratio, relative_to=relative_to), found.fits[:, None]
    # An image in which none fits has the largest central crop.
    return np.where(fits, found.anchor, (sizes - largest) // 2), np.where(fits, found.shape, largest)


def _largest_within(
    sizes: NDArray[np.int64], ratio: tuple[float, float], *, relative_to: NDArray[np.float64] | float
) -> NDArray[np.int64]:
    height, width = sizes[:, 0], sizes[:, 1]
    aspect, (low, high) = width / height, (bound * relative_to for bound in ratio)
    fitted_height = np.where(aspect < low, np.rint(width / low), height)
    fitted_width = np.where(aspect > high, np.rint(height * high), width)
    fitted = np.stack([fitted_height, fitted_width], axis=1).astype(np.int64)  # (N, 2)
    return np.maximum(fitted, 1)
