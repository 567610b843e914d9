"""What packing and indexing ask of an encoded image: its size, whether it is whole, its colours, a smaller copy."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = ("jpg", "jpeg", "png", "webp")
EXIF_ORIENTATION = 0x0112
# What PIL raises on bytes that are no image, or only a part of one.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class UnreadableImage(ValueError):
    """Bytes that are no whole image of a readable kind; the text says why."""


def oriented_size(encoded: bytes) -> tuple[int, int]:
    """Height and width in pixels after EXIF orientation, read from the header alone.

    Raises: UnreadableImage when there is no header, or it promises more pixels than
    PIL takes for honest (a file of 1.5 kB may say 14000 x 14000).
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG", "WEBP")) as image:
            _check_pixels(image)
            width, height = image.size
            # Without this look first, PIL decodes a whole PNG to find that it has no EXIF block.
            orientation = image.getexif().get(EXIF_ORIENTATION, 1) if "exif" in image.info else 1
    except UNREADABLE as error:
        raise _unreadable(encoded, error) from error
    return (width, height) if orientation >= 5 else (height, width)


def whole_size(encoded: bytes) -> tuple[int, int]:
    """`oriented_size` of an image that decodes to its end. Raises: UnreadableImage when a part is missing too."""
    check_whole(encoded)
    return oriented_size(encoded)


def check_whole(encoded: bytes) -> None:
    """Decode the image and throw it away; a JPEG at an eighth of its size, which still reads every byte.

    Raises: UnreadableImage when a part is missing.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG", "WEBP")) as image:
            _check_pixels(image)
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
    except UNREADABLE as error:
        raise _unreadable(encoded, error) from error


def colour_sums(encoded: bytes) -> NDArray[np.float64]:
    """Pixels, then the sum and the sum of squares of red, green and blue as fractions of 255: (7,)."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            pixels = np.asarray(image.convert("RGB"))  # (H, W, 3)
    except UNREADABLE as error:
        raise _unreadable(encoded, error) from error
    # Counting the 256 levels of a channel is exact and faster than squaring every pixel.
    counts = np.stack([np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(3)])  # (3, 256)
    levels = np.arange(256) / 255
    return np.concatenate([[pixels.shape[0] * pixels.shape[1]], counts @ levels, counts @ levels**2])


def shrink(encoded: bytes, shorter_side: int) -> bytes:
    """Re-encode as JPEG of quality 95 with this shorter side in pixels; an image no larger comes back as it is."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if min(image.size) <= shorter_side:
                return encoded
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except UNREADABLE as error:
        raise _unreadable(encoded, error) from error
    scale = shorter_side / min(upright.size)
    smaller = upright.resize((round(upright.width * scale), round(upright.height * scale)), Image.Resampling.BICUBIC)
    return to_jpeg(smaller, quality=95)


def to_jpeg(image: Image.Image, *, quality: int) -> bytes:
    """Encode as JPEG without metadata."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _check_pixels(image: Image.Image) -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {Image.MAX_IMAGE_PIXELS:,}")


def _unreadable(encoded: bytes, error: Exception) -> UnreadableImage:
    if not encoded:
        return UnreadableImage("the file is empty")
    if isinstance(error, UnidentifiedImageError):
        return UnreadableImage("no JPEG, PNG or WebP image")
    return UnreadableImage(str(error) or type(error).__name__)
