"""Operations on one image on a CPU, by OpenCV, within a level of those of `operations` and `geometry`.

All work in place: results of 128 KiB or more in fresh memory would cost as much as the operations. Where an operation
turns each level into another one, the functions of `operations` compute a table of all levels.
"""

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import cv2
import numpy as np
import torch
from cv2.typing import MatLike
from numpy.typing import NDArray
from torch import Tensor

from data.augment import operations
from data.augment.geometry import GEOMETRIC_OPERATIONS, Fill
from data.augment.operations import BLUR_REACH, GREY, PIXEL_OPERATIONS

Image = NDArray[np.uint8]  # (H, W, 3), contiguous
Change = Callable[[Image, float], None]  # an image, in place, and a magnitude

AXES = {"translate_y": 0, "translate_x": 1}
LEVELS = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).repeat(1, 1, 1, 3)  # an image of all levels
CENTRE = 4 / 13  # the smooth image is the mean of nine pixels, and this share of the central one in addition
TRUNCATE = -0.499  # added before OpenCV rounds: numbers lose their fraction, and integers stay

cv2.setNumThreads(1)  # the loader has threads, each with an image


class _Memory(threading.local):
    """An image of each size and number of channels, for results, in every thread."""

    def __init__(self) -> None:
        self._images: dict[tuple[tuple[int, ...], int], Image] = {}

    def like(self, image: Image, *, channels: int = 3, number: int = 0) -> Image:
        """Return memory for an image of this size, (H, W, channels) or (H, W); its content is undefined."""
        shape = (*image.shape[:2], channels)[: 3 if channels > 1 else 2]
        if (shape, number) not in self._images:
            self._images[shape, number] = np.empty(shape, np.uint8)
        return self._images[shape, number]


memory = _Memory()


def copy_image(image: Image, place: Image, *, mirror: bool) -> None:
    """Copy an image to another place, from right to left if it is mirrored."""
    if mirror:
        cv2.flip(image, 1, dst=place)
    else:
        place[:] = image


def change_image(name: str, image: Image, *, magnitude: float, fill: Fill) -> None:
    """Apply the operation of this name in place; `fill` comes in from outside."""
    if name in CHANGES:
        CHANGES[name](image, magnitude)
    elif name in AXES and magnitude.is_integer():
        _shift(image, int(magnitude), axis=AXES[name], fill=fill)
    else:
        _warp(image, name, magnitude=magnitude, fill=fill)


def _contrast(image: Image, factor: float) -> None:
    mean = torch.tensor(cv2.mean(_grey(image))[0])
    _look_up(image, operations.blend(LEVELS, mean, factors=torch.tensor([factor]))[0, 0, :, 0])


def _saturation(image: Image, factor: float) -> None:
    grey = cv2.cvtColor(_grey(image), cv2.COLOR_GRAY2RGB, dst=memory.like(image))
    cv2.addWeighted(image, factor, grey, 1 - factor, TRUNCATE, dst=image)


def _grey(image: Image) -> MatLike:
    return cv2.transform(image, np.array([[*GREY, TRUNCATE]]), dst=memory.like(image, channels=1))  # (H, W)


def _sharpness(image: Image, factor: float) -> None:
    mean, rest = cv2.boxFilter(image, -1, (3, 3), dst=memory.like(image)), 1 - factor
    blended = cv2.addWeighted(image, factor + rest * CENTRE, mean, rest * (1 - CENTRE), TRUNCATE, dst=mean)
    image[1:-1, 1:-1] = blended[1:-1, 1:-1]


def _autocontrast(image: Image, _: float) -> None:
    channels = _split(image)
    low, high = torch.tensor([cv2.minMaxLoc(channel)[:2] for channel in channels]).T[:, None]  # (1, 3) each
    _look_up_each(image, channels, tables=operations.stretch(LEVELS, low, high=high)[0, 0])


def _equalize(image: Image, _: float) -> None:
    channels = _split(image)
    counts = [cv2.calcHist([channel], [0], None, [256], [0, 256]) for channel in channels]
    tables = operations.equalizing_tables(torch.from_numpy(np.stack(counts).reshape(3, 256).astype(np.int64)))
    _look_up_each(image, channels, tables=tables.T)


def _blur(image: Image, sigma: float) -> None:
    weights = np.exp(-0.5 * (np.arange(-BLUR_REACH, BLUR_REACH + 1) / sigma) ** 2)
    weights /= weights.sum()
    image[:] = cv2.sepFilter2D(image, -1, weights, weights, dst=memory.like(image), borderType=cv2.BORDER_REFLECT_101)


def _by_table(image: Image, magnitude: float, *, name: str) -> None:
    _look_up(image, _table(name, magnitude))


@lru_cache(maxsize=512)  # TrivialAugment, RandAugment and AutoAugment have fewer magnitudes
def _table(name: str, magnitude: float) -> Tensor:
    return PIXEL_OPERATIONS[name](LEVELS, torch.tensor([magnitude]))[0, 0, :, 0]  # (256,)


def _look_up(image: Image, table: Tensor) -> None:
    """Replace each level by that of the table, (256,)."""
    cv2.LUT(image, table.contiguous().numpy(), dst=image)


def _split(image: Image) -> Sequence[MatLike]:
    return cv2.split(image, [memory.like(image, channels=1, number=number) for number in range(3)])  # (H, W) each


def _look_up_each(image: Image, channels: Sequence[MatLike], *, tables: Tensor) -> None:
    """The same with a table for each channel, (256, 3)."""
    replaced = [
        cv2.LUT(one, table, dst=one) for one, table in zip(channels, tables.T.contiguous().numpy(), strict=True)
    ]
    cv2.merge(replaced, dst=image)


def _hue(image: Image, turn: float) -> None:  # OpenCV has 180 hues
    image[:] = PIXEL_OPERATIONS["hue"](torch.from_numpy(image)[None], torch.tensor([turn]))[0].numpy()


CHANGES: dict[str, Change] = {
    **{
        name: partial(_by_table, name=name)
        for name in ("brightness", "posterize", "solarize", "solarize_add", "invert")
    },
    **{"contrast": _contrast, "saturation": _saturation, "hue": _hue, "sharpness": _sharpness},
    **{"autocontrast": _autocontrast, "equalize": _equalize, "blur": _blur},
}


def _shift(image: Image, pixels: int, *, axis: int, fill: Fill) -> None:
    """Move an image by an integer number of pixels."""
    old, new, length = memory.like(image).swapaxes(0, axis), image.swapaxes(0, axis), image.shape[axis]
    old[:] = new
    pixels = max(-length, min(pixels, length))
    if pixels >= 0:
        new[:pixels], new[pixels:] = fill, old[: length - pixels]
    else:
        new[pixels:], new[:pixels] = fill, old[-pixels:]


@lru_cache(maxsize=512)
def _matrix(name: str, magnitude: float, *, size: tuple[int, int]) -> NDArray[np.float64]:
    """Return the affine map, (2, 3), from an output pixel's column and row to the input's."""
    numbers = GEOMETRIC_OPERATIONS[name](torch.tensor([magnitude]), size)
    matrix = torch.cat(numbers).double().view(2, 3).numpy()  # from the centre; OpenCV's is from the first pixel's
    centre = np.array([size[1] - 1, size[0] - 1]) / 2
    matrix[:, 2] += centre - matrix[:, :2] @ centre
    return matrix


def _warp(image: Image, name: str, *, magnitude: float, fill: Fill) -> None:
    """Interpolate bilinearly at the places of a geometric operation."""
    height, width, _ = image.shape
    matrix = _matrix(name, magnitude, size=(height, width))
    # Four channels take half as long as three.
    four, warped = memory.like(image, channels=4), memory.like(image, channels=4, number=1)
    cv2.cvtColor(image, cv2.COLOR_RGB2RGBA, dst=four)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    outside = (*fill, 0)
    cv2.warpAffine(
        four, matrix, (width, height), dst=warped, flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=outside
    )
    cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB, dst=image)
