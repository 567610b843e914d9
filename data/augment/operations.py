"""Operations on batches of uint8 images (N, H, W, 3), one magnitude per image, on any device.

Every operation is torchvision's of the same name, within one level. It is made of elementwise steps that are each
rounded once, and of sums of integers, so that an image comes out the same in any batch and with any number of threads.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

GREY = (0.2989, 0.587, 0.114)  # weights of the channels: ITU-R BT.601
BLUR_REACH, MAX_SIGMA = 8, 2.0  # pixels on each side, which are four of the largest deviation
HALF = 128  # of the levels: only what is below gets brighter in `solarize_add`

Operation = Callable[[Tensor, Tensor], Tensor]  # images (N, H, W, 3), magnitudes (N,) -> images (N, H, W, 3)


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Multiply all levels; 0 is black, 1 the image itself."""
    return _to_levels(images * _per_image(factors))


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the mean of the grey image; 0 is grey, 1 the image itself."""
    grey = _grey(images)  # (N, H, W, 1)
    mean = (grey.to(torch.int64).sum((1, 2, 3)).double() / grey[0].numel()).float()
    return blend(images, _per_image(mean), factors=factors)


def saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the grey image; 0 is grey, 1 the image itself."""
    share = factors.view(-1, 1, 1)
    grey = (_grey(images).flatten(2) * (1 - share)).repeat_interleave(3, 2)  # (N, H, W * 3), which is vectorised
    return _to_levels(images.flatten(2) * share + grey).view_as(images)


def sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with a smoothed image, except at the border; 0 is smooth, 1 the image itself."""
    if min(images.shape[1:3]) <= 2:
        return images
    levels = images.to(torch.int16)
    columns = levels[:, :, :-2] + levels[:, :, 1:-1] + levels[:, :, 2:]  # (N, H, W - 2, 3)
    inner = levels[:, 1:-1, 1:-1]  # (N, H - 2, W - 2, 3)
    total = columns[:, :-2] + columns[:, 1:-1] + columns[:, 2:] + 4 * inner  # weights 1, and 5 in the middle
    sharpened = images.clone()
    sharpened[:, 1:-1, 1:-1] = blend(inner, (total / 13).round_(), factors=factors)
    return sharpened


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest bits of each level, 0 to 8 of them."""
    masks = 256 - 2 ** (8 - bits.round().long())
    return images & _per_image(masks.to(torch.uint8))


def solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    """Invert the levels from a threshold on, 0 to 256."""
    below = _per_image(thresholds.ceil().to(torch.int16)) - 1 - images.to(torch.int16)
    is_inverted = (below >> 15).to(torch.uint8)  # 255 for a negative number; a comparison takes three times as long
    return images ^ is_inverted


def solarize_add(images: Tensor, levels: Tensor) -> Tensor:
    """Add levels to those below the half (timm's SolarizeAdd)."""
    return torch.where(images < HALF, _to_levels(images + _per_image(levels)), images)


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to all levels; a channel of one level stays."""
    low, high = images.amin(1).amin(1), images.amax(1).amax(1)  # (N, 3); one axis is vectorised
    return stretch(images, low.float(), high=high.float())


def stretch(images: Tensor, low: Tensor, *, high: Tensor) -> Tensor:
    """Give the lowest level of each channel 0, and the highest 255: float32 (N, 3) each."""
    is_flat = high == low
    low, unit = low.masked_fill(is_flat, 0.0), ((high - low) * (1 / 255)).masked_fill(is_flat, 1.0)
    rows = images.flatten(2)  # (N, H, W * 3)
    return _to_levels((rows - _per_row(low, images)) / _per_row(unit, images)).view_as(images)


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Make the levels of each channel equally frequent."""
    num_images = len(images)
    first = 256 * torch.arange(num_images * 3, device=images.device).view(num_images, 3)
    places = (images.flatten(2) + _per_row(first, images)).view(-1)  # one histogram after another
    counts = torch.zeros(num_images * 3 * 256, dtype=torch.int64, device=images.device)
    counts = counts.scatter_add_(0, places, torch.ones_like(places)).view(-1, 256)  # (N * 3, 256)
    return equalizing_tables(counts).view(-1).gather(0, places).view_as(images)


def equalizing_tables(counts: Tensor) -> Tensor:
    """Return the level for each level of a channel with so many pixels of each: int64 (M, 256) -> uint8 (M, 256)."""
    levels = torch.arange(256, device=counts.device)
    highest = ((counts > 0) * levels).amax(1, keepdim=True)  # (M, 1)
    step = (counts.sum(1, keepdim=True) - counts.gather(1, highest)) // 255
    below = functional.pad(counts.cumsum(1), (1, -1))  # pixels with a lower level
    tables = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    return torch.where(step == 0, levels, tables).to(torch.uint8)


def invert(images: Tensor, _: Tensor) -> Tensor:
    """Invert all levels."""
    return 255 - images


def hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue by a part of the circle, -0.5 to 0.5, at the same value and saturation."""
    red, green, blue = (images / 255).unbind(3)  # (N, H, W)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    sector = torch.where(value == green, (blue - red) / chroma + 2, (red - green) / chroma + 4)
    sector = torch.where(value == red, (green - blue) / chroma, sector)  # 0 to 6 around the circle
    sector = torch.where(chroma == 0, 0.0, sector) + 6 * turns.view(-1, 1, 1)
    channels = []
    for start in (5, 3, 1):
        distance = torch.remainder(sector + start, 6)
        channels.append(value - chroma * torch.minimum(distance, 4 - distance).clamp_(0, 1))
    return _to_levels((torch.stack(channels, 3) * 255).add_(0.5))


def blur(images: Tensor, sigmas: Tensor) -> Tensor:
    """Blur by a Gaussian of this deviation in pixels, at most 2; the image is mirrored at its border."""
    offsets = range(-BLUR_REACH, BLUR_REACH + 1)
    weights = torch.exp(-0.5 * (torch.tensor(offsets, device=images.device) / sigmas[:, None].double()) ** 2)
    weights = (weights / weights.sum(1, keepdim=True)).float()  # (N, offsets)
    blurred = images.float()
    for axis in (1, 2):
        size = images.shape[axis]
        total = torch.zeros_like(blurred)
        for offset, weight in zip(offsets, weights.unbind(1), strict=True):
            total += blurred.index_select(axis, _mirrored(size, offset, device=images.device)) * _per_image(weight)
        blurred = total
    return _to_levels(blurred.round_())


PIXEL_OPERATIONS: dict[str, Operation] = {
    operation.__name__: operation
    for operation in (
        *(brightness, contrast, saturation, sharpness, posterize, solarize, solarize_add, invert),
        *(autocontrast, equalize, hue, blur),
    )
}


def _mirrored(size: int, offset: int, *, device: torch.device) -> Tensor:
    """Return the places of 0..size-1 plus an offset, mirrored at the first and the last."""
    if size == 1:
        return torch.zeros(1, dtype=torch.int64, device=device)
    places = (torch.arange(size, device=device) + offset).remainder(2 * size - 2)
    return torch.minimum(places, 2 * size - 2 - places)


def _grey(images: Tensor) -> Tensor:
    """Weigh the channels: (N, H, W, 3) -> float32 (N, H, W, 1), integers."""
    red, green, blue = (channel * weight for channel, weight in zip(images.unbind(3), GREY, strict=True))
    return (red + green + blue).floor_().unsqueeze(3)


def blend(images: Tensor, others: Tensor, *, factors: Tensor) -> Tensor:
    """Return factor * image + (1 - factor) * other, without the fraction."""
    share = _per_image(factors)
    return _to_levels(images * share + others * (1 - share))


def _per_row(values: Tensor, images: Tensor) -> Tensor:
    """Repeat values of channels along a row, where arithmetic is vectorised: (N, 3) -> (N, 1, W * 3)."""
    return values.repeat(1, images.shape[2])[:, None]


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _to_levels(values: Tensor) -> Tensor:
    return values.clamp_(0, 255).to(torch.int16).to(torch.uint8)  # in two steps, which are vectorised
