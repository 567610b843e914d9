"""Encoded images: size, integrity, colour statistics, a smaller copy."""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from PIL.TiffTags import LONG, SHORT

SUFFIXES = ("jpg", "jpeg", "png", "webp")
FORMATS = ("JPEG", "PNG", "WEBP")
EXIF_ORIENTATION = 0x0112
FILLED_ZEROS = 32  # more than a coder of WebP leaves at the end
SWAPS_SIDES = (5, 6, 7, 8)  # orientations; others than 1 to 8 mean nothing
# PIL's exceptions for bytes that are not an image, or only a part of one.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class UnreadableImage(ValueError):
    """Bytes that are not a complete image of a supported format; the message is the reason."""


def oriented_size(encoded: bytes) -> tuple[int, int]:
    """Read height and width in pixels, after EXIF orientation, from the header alone. Raises: UnreadableImage."""
    with _open(encoded) as image:
        width, height = image.size
        orientation = _orientation(image)
    return (width, height) if orientation in SWAPS_SIDES else (height, width)


def intact_size(encoded: bytes) -> tuple[int, int]:
    """Return the `oriented_size` of an image that decodes completely. Raises: UnreadableImage."""
    check_intact(encoded)
    return oriented_size(encoded)


def check_intact(encoded: bytes) -> None:
    """Decode the image and discard it. Raises: UnreadableImage when a part is missing."""
    with _open(encoded) as image:
        # A JPEG at an eighth of its size, which still reads every byte.
        image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
        end = encoded.rfind(b"IEND")  # followed by a checksum of 4 bytes; PIL does without both, DALI does not
        if image.format == "PNG" and not encoded.rfind(b"IDAT") < end <= len(encoded) - 8:
            raise ValueError("the end of the PNG is missing")
        if _is_zero_filled(encoded):
            raise ValueError("zeros have replaced its end")


def colour_sums(encoded: bytes) -> NDArray[np.float64]:
    """Return the number of pixels, then the sums and the sums of squares of red, green and blue / 255: (7,)."""
    with _open(encoded) as image:
        pixels = np.asarray(image.convert("RGB"))  # (H, W, 3)
    # Counting the 256 levels of a channel is exact, and faster than squaring every pixel.
    counts = np.stack([np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(3)])  # (3, 256)
    levels = np.arange(256) / 255
    return np.concatenate([[pixels.shape[0] * pixels.shape[1]], counts @ levels, counts @ levels**2])


def shrink(encoded: bytes, shorter_side: int) -> bytes:
    """Re-encode as JPEG of quality 95 with this shorter side in pixels; a smaller image is returned unchanged."""
    with _open(encoded) as image:
        if min(image.size) <= shorter_side:
            return encoded
        upright = ImageOps.exif_transpose(image).convert("RGB")
    scale = shorter_side / min(upright.size)
    smaller = upright.resize((round(upright.width * scale), round(upright.height * scale)), Image.Resampling.BICUBIC)
    return to_jpeg(smaller, quality=95)


def to_jpeg(image: Image.Image, *, quality: int) -> bytes:
    """Encode as JPEG without metadata."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation. Raises: ValueError for one that is no 16-bit number, where DALI reads another."""
    if "exif" not in image.info:  # otherwise PIL decodes an entire PNG only to report that it has no EXIF block
        return 1
    orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    if orientation != 1:
        exif = image.info["exif"].removeprefix(b"Exif\0\0")
        directory = ImageFileDirectory_v2(exif[:8])
        block = io.BytesIO(exif)
        block.seek(directory.next)
        directory.load(block)
        kind = directory.tagtype.get(EXIF_ORIENTATION, SHORT)
        if kind != SHORT and not (kind == LONG and exif.startswith(b"II")):  # DALI reads the first 16 bits
            raise ValueError("its EXIF orientation is not a 16-bit number")
    return int(orientation)


def _is_zero_filled(encoded: bytes) -> bool:
    """Whether a JPEG or WebP has a tail of zeros instead of its end. Decoders take them for data: the rest is grey."""
    if not encoded.endswith(b"\0"):
        return False
    if encoded.startswith(b"\xff\xd8"):  # the end marker is missing after the last scan; a thumbnail has its own
        return encoded.rfind(b"\xff\xd9") <= encoded.rfind(b"\xff\xda")
    return encoded[12:15] == b"VP8" and encoded[15:16] in b" L" and encoded.endswith(bytes(FILLED_ZEROS))


@contextmanager
def _open(encoded: bytes) -> Iterator[Image.Image]:
    """Open an image; its errors, also those inside the block, become UnreadableImage."""
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:  # a file of 1.5 kB may declare 14000 x 14000
                raise ValueError(f"{image.width} x {image.height} pixels are more than {limit:,}")
            yield image
    except UNREADABLE as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "not a JPEG, PNG or WebP image"
        raise UnreadableImage(reason if encoded else "the file is empty") from error
