"""Apply the operations that a policy has drawn to a batch of images."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.augment.geometry import GEOMETRIC_OPERATIONS, Fill, warp
from data.augment.opencv import change_image
from data.augment.operations import PIXEL_OPERATIONS

IDENTITY = "identity"
NAMES = (IDENTITY, *PIXEL_OPERATIONS, *GEOMETRIC_OPERATIONS)
CODES = {name: code for code, name in enumerate(NAMES)}


class Operations(NamedTuple):
    """The operations of each image in their order: positions in `NAMES`, and their magnitudes."""

    codes: NDArray[np.int32]  # (N, S)
    magnitudes: NDArray[np.float32]  # (N, S)


def apply_operations(images: Tensor, drawn: Operations, *, fill: Fill) -> Tensor:
    """Apply the operations of each image, in place: uint8 (N, H, W, 3) on any device. `fill` comes in from outside."""
    if images.device.type == "cpu":
        apply_singly(images.numpy(), drawn, fill=fill)
    else:
        apply_together(images, drawn, fill=fill)
    return images


def apply_singly(images: NDArray[np.uint8], drawn: Operations, *, fill: Fill) -> None:
    """Apply the operations to one image after another, which stays in the processor's cache."""
    for image, codes, magnitudes in zip(images, drawn.codes.tolist(), drawn.magnitudes.tolist(), strict=True):
        for code, magnitude in zip(codes, magnitudes, strict=True):
            if code != CODES[IDENTITY]:
                change_image(NAMES[code], image, magnitude=magnitude, fill=fill)


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
