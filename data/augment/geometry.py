"""Geometric operations on batches of uint8 images (N, H, W, 3): where each pixel comes from, and its interpolation."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Fill = tuple[int, int, int]  # levels of pixels from outside the image
# Six tensors (N,): the input's column is a x + b y + c for the output's pixel (x, y), its row d x + e y + f; both count
# from the centre of the image, in pixels.
Affine = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Geometry = Callable[[Tensor, tuple[int, int]], Affine]  # magnitudes (N,), height and width


def shear_x(slopes: Tensor, size: tuple[int, int]) -> Affine:
    """Shift each row by its distance from the top times the slope."""
    one, zero = torch.ones_like(slopes), torch.zeros_like(slopes)
    return one, slopes, slopes * (size[0] / 2), zero, one, zero


def shear_y(slopes: Tensor, size: tuple[int, int]) -> Affine:
    """Shift each column by its distance from the left times the slope."""
    one, zero = torch.ones_like(slopes), torch.zeros_like(slopes)
    return one, zero, zero, slopes, one, slopes * (size[1] / 2)


def translate_x(pixels: Tensor, size: tuple[int, int]) -> Affine:
    """Move the image to the right."""
    one, zero = torch.ones_like(pixels), torch.zeros_like(pixels)
    return one, zero, -pixels, zero, one, zero


def translate_y(pixels: Tensor, size: tuple[int, int]) -> Affine:
    """Move the image down."""
    one, zero = torch.ones_like(pixels), torch.zeros_like(pixels)
    return one, zero, zero, zero, one, -pixels


def rotate(degrees: Tensor, size: tuple[int, int]) -> Affine:
    """Rotate the image counterclockwise about its centre."""
    angles = torch.deg2rad(degrees.double())  # float32 sines differ between kernels in their last bit
    cosine, sine, zero = angles.cos().float(), angles.sin().float(), torch.zeros_like(degrees)
    return cosine, -sine, zero, sine, cosine, zero


GEOMETRIC_OPERATIONS: dict[str, Geometry] = {
    operation.__name__: operation for operation in (shear_x, shear_y, translate_x, translate_y, rotate)
}


def warp(images: Tensor, affine: Affine, *, fill: Fill) -> Tensor:
    """Interpolate each image bilinearly at the places of an affine map, with `fill` outside.

    Shapes: uint8 (N, H, W, 3) -> (N, H, W, 3).
    """
    num_images, height, width, _ = images.shape
    x = torch.arange(width, device=images.device) + 0.5 - width / 2  # (W,)
    y = (torch.arange(height, device=images.device) + 0.5 - height / 2)[:, None]  # (H, 1)
    a, b, c, d, e, f = (values.view(-1, 1, 1) for values in affine)
    grid = torch.empty(num_images, height, width, 2, device=images.device)  # columns and rows from -1 to 1
    torch.add(a * x * (2 / width), (b * y + c) * (2 / width), out=grid[..., 0])
    torch.add(d * x * (2 / height), (e * y + f) * (2 / height), out=grid[..., 1])
    levels = images.permute(0, 3, 1, 2).float()
    outside = torch.tensor(fill, device=images.device, dtype=levels.dtype).view(1, 3, 1, 1)
    if any(fill):
        levels -= outside  # zeros are interpolated outside
    sampled = functional.grid_sample(levels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    if any(fill):
        sampled += outside
    return sampled.round_().to(torch.int16).to(torch.uint8).permute(0, 2, 3, 1)
