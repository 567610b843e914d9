"""Operations on one image on a CPU, by OpenCV, within a level of those of `operations` and `geometry`.

Where an operation turns each level into another one, those functions compute a table of all levels.
"""

from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
import torch
from cv2.typing import MatLike
from numpy.typing import NDArray
from torch import Tensor

from data.augment import operations
from data.augment.geometry import GEOMETRIC_OPERATIONS, Fill
from data.augment.operations import BLUR_REACH, GREY, PIXEL_OPERATIONS, Operation

Image = NDArray[np.uint8]  # (H, W, 3)
Change = Callable[[Image, float], Image | MatLike]  # an image and a magnitude -> another image, or the same one

AXES = {"translate_y": 0, "translate_x": 1}
LEVELS = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).repeat(1, 1, 1, 3)  # an image of all levels
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
TRUNCATE = -0.499  # added before OpenCV rounds: numbers lose their fraction, and integers stay

cv2.setNumThreads(1)  # the loader has threads, each with an image


def change_image(name: str, image: Image, *, magnitude: float, fill: Fill) -> Image | MatLike:
    """Apply the operation of this name; `fill` comes in from outside."""
    if name in CHANGES:
        return CHANGES[name](image, magnitude)
    if name in AXES and magnitude.is_integer():
        return _shift(image, int(magnitude), axis=AXES[name], fill=fill)
    return _warp(image, name, magnitude=magnitude, fill=fill)


def _contrast(image: Image, factor: float) -> MatLike:
    mean = torch.tensor(cv2.mean(_grey(image))[0])
    return _look_up(image, operations.blend(LEVELS, mean, factors=torch.tensor([factor]))[..., 0])


def _saturation(image: Image, factor: float) -> MatLike:
    return cv2.addWeighted(image, factor, cv2.cvtColor(_grey(image), cv2.COLOR_GRAY2RGB), 1 - factor, TRUNCATE)


def _grey(image: Image) -> MatLike:
    return cv2.transform(image, np.array([[*GREY, TRUNCATE]]))  # (H, W)


def _sharpness(image: Image, factor: float) -> Image:
    sharpened, smooth = image.copy(), cv2.filter2D(image, -1, SMOOTH)
    blended = cv2.addWeighted(image, factor, smooth, 1 - factor, TRUNCATE)
    sharpened[1:-1, 1:-1] = blended[1:-1, 1:-1]
    return sharpened


def _autocontrast(image: Image, _: float) -> MatLike:
    levels = torch.from_numpy(image)
    low, high = levels.amin(0).amin(0)[None], levels.amax(0).amax(0)[None]  # (1, 3); NumPy takes ten times as long
    return _look_up(image, operations.stretch(LEVELS, low.float(), high=high.float()))


def _equalize(image: Image, _: float) -> MatLike:
    counts = [cv2.calcHist([image], [channel], None, [256], [0, 256]) for channel in range(3)]
    tables = operations.equalizing_tables(torch.from_numpy(np.stack(counts).reshape(3, 256).astype(np.int64)))
    return _look_up(image, tables.T)


def _blur(image: Image, sigma: float) -> MatLike:
    weights = np.exp(-0.5 * (np.arange(-BLUR_REACH, BLUR_REACH + 1) / sigma) ** 2)
    weights /= weights.sum()
    return cv2.sepFilter2D(image, -1, weights, weights, borderType=cv2.BORDER_REFLECT_101)


def _by_table(image: Image, magnitude: float, *, operation: Operation) -> MatLike:
    return _look_up(image, operation(LEVELS, torch.tensor([magnitude]))[..., 0])


def _look_up(image: Image, tables: Tensor) -> MatLike:
    """Replace each level by that of a table of 256, or of its channel's: tables of 256 x 3."""
    return cv2.LUT(image, tables.contiguous().view(256, 1, -1).numpy())


def _by_torch(image: Image, magnitude: float, *, operation: Operation) -> Image:
    changed: Image = operation(torch.from_numpy(image)[None], torch.tensor([magnitude]))[0].numpy()
    return changed


CHANGES: dict[str, Change] = {
    **{
        name: partial(_by_table, operation=PIXEL_OPERATIONS[name])
        for name in ("brightness", "posterize", "solarize", "solarize_add", "invert")
    },
    **{"contrast": _contrast, "saturation": _saturation, "sharpness": _sharpness},
    **{"autocontrast": _autocontrast, "equalize": _equalize, "blur": _blur},
    "hue": partial(_by_torch, operation=PIXEL_OPERATIONS["hue"]),  # OpenCV's has 180 hues
}


def _shift(image: Image, pixels: int, *, axis: int, fill: Fill) -> Image:
    """Move an image by an integer number of pixels."""
    moved = np.roll(image, pixels, axis)
    band = slice(0, pixels) if pixels >= 0 else slice(pixels, None)
    np.moveaxis(moved, axis, 0)[band] = fill
    return moved


def _warp(image: Image, name: str, *, magnitude: float, fill: Fill) -> MatLike:
    """Interpolate bilinearly at the places of a geometric operation."""
    size = image.shape[:2]
    numbers = GEOMETRIC_OPERATIONS[name](torch.tensor([magnitude]), size)
    matrix = torch.cat(numbers).double().view(2, 3).numpy()  # from the centre; OpenCV's is from the first pixel's
    centre = np.array([size[1] - 1, size[0] - 1]) / 2
    matrix[:, 2] += centre - matrix[:, :2] @ centre
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, matrix, size[::-1], flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=fill)
