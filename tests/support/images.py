"""JPEGs made on the spot."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def make_jpeg(height: int, width: int, seed: int = 0, **options: object) -> bytes:
    """Encode a JPEG with coarse and fine detail in all three colours."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    pixels = (pixels + generator.integers(-20, 21, pixels.shape)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def make_folder(root: Path, *, classes: int = 3, images: int = 8, size: tuple[int, int] = (40, 56)) -> Path:
    """Write class folders of JPEGs, all different."""
    for label in range(classes):
        for number in range(images):
            path = root / f"class{label}" / f"{number:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(make_jpeg(*size, seed=label * images + number))
    return root


def orientation(value: int) -> Image.Exif:
    """Build an EXIF block with an orientation."""
    exif = Image.Exif()
    exif[0x0112] = value
    return exif
