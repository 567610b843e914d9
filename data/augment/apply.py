"""Apply the operations that a policy has drawn to a batch of images, those of one kind together."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.augment import geometry, operations
from data.augment.geometry import Fill, Geometry, shift, warp
from data.augment.operations import Operation

IDENTITY = "identity"
PIXEL_OPERATIONS: dict[str, Operation] = {
    operation.__name__: operation
    for operation in (
        *(operations.brightness, operations.contrast, operations.saturation, operations.sharpness),
        *(operations.posterize, operations.solarize, operations.solarize_add, operations.invert),
        *(operations.autocontrast, operations.equalize, operations.hue, operations.blur),
    )
}
GEOMETRIC_OPERATIONS: dict[str, Geometry] = {
    operation.__name__: operation
    for operation in (
        *(geometry.shear_x, geometry.shear_y, geometry.translate_x, geometry.translate_y, geometry.rotate),
    )
}
AXES = {"translate_x": 2, "translate_y": 1}  # of images (N, H, W, 3)
NAMES = (IDENTITY, *PIXEL_OPERATIONS, *GEOMETRIC_OPERATIONS)
CODES = {name: code for code, name in enumerate(NAMES)}


class Operations(NamedTuple):
    """The operations of each image in their order: positions in `NAMES`, and their magnitudes."""

    codes: NDArray[np.int32]  # (N, S)
    magnitudes: NDArray[np.float32]  # (N, S)


def apply_operations(images: Tensor, drawn: Operations, *, fill: Fill) -> Tensor:
    """Apply the operations of each image, in place: uint8 (N, H, W, 3) on any device. `fill` comes in from outside."""
    if images.device.type == "cpu":
        apply_singly(images, drawn, fill=fill)
    else:
        apply_together(images, drawn, fill=fill)
    return images


def apply_singly(images: Tensor, drawn: Operations, *, fill: Fill) -> None:
    """Apply the operations to one image after another, which stays in the processor's cache."""
    for image, codes, magnitudes in zip(
        torch.split(images, 1), drawn.codes.tolist(), drawn.magnitudes.tolist(), strict=True
    ):
        for code, magnitude in zip(codes, magnitudes, strict=True):
            name = NAMES[code]
            if name in AXES and magnitude.is_integer():
                image.copy_(shift(image, int(magnitude), axis=AXES[name], fill=fill))
            elif name != IDENTITY:
                image.copy_(_apply(name, image, magnitudes=torch.tensor([magnitude]), fill=fill))


def apply_together(images: Tensor, drawn: Operations, *, fill: Fill) -> None:
    """Apply each operation to all images that have it, which takes the fewest kernels of a GPU."""
    for codes, magnitudes in zip(drawn.codes.T, drawn.magnitudes.T, strict=True):
        order = np.argsort(codes, kind="stable")
        present, starts = np.unique(codes[order], return_index=True)
        places = torch.from_numpy(order).to(images.device, non_blocking=True)
        strengths = torch.from_numpy(magnitudes[order]).to(images.device, non_blocking=True)
        for code, start, end in zip(present.tolist(), starts.tolist(), [*starts[1:], len(order)], strict=True):
            if code != CODES[IDENTITY]:
                chosen = images.index_select(0, places[start:end])
                changed = _apply(NAMES[code], chosen, magnitudes=strengths[start:end], fill=fill)
                images.index_copy_(0, places[start:end], changed)


def _apply(name: str, images: Tensor, *, magnitudes: Tensor, fill: Fill) -> Tensor:
    if name in PIXEL_OPERATIONS:
        return PIXEL_OPERATIONS[name](images, magnitudes)
    _, height, width, _ = images.shape
    return warp(images, GEOMETRIC_OPERATIONS[name](magnitudes, (height, width)), fill=fill)
