"""A picture of many images with their labels."""

import math
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

COLUMNS, MIN_SIDE, GAP, TEXT = 8, 112, 6, 14  # pixels, except for the columns


def draw_grid(images: NDArray[np.uint8], labels: list[str]) -> Image.Image:
    """Draw images (N, H, W, 3) in rows of eight, each with its label below; small images are enlarged."""
    count, height, width, _ = images.shape
    factor = max(1, math.ceil(MIN_SIDE / min(height, width)))
    cell = (width * factor + GAP, height * factor + TEXT + 2 * GAP)  # width, height
    columns = min(COLUMNS, count)
    grid = Image.new("RGB", (columns * cell[0] + GAP, math.ceil(count / columns) * cell[1] + GAP), "white")
    draw, font = ImageDraw.Draw(grid), _load_font()
    for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        left, top = GAP + number % columns * cell[0], GAP + number // columns * cell[1]
        image = Image.fromarray(pixels).resize((width * factor, height * factor), Image.Resampling.NEAREST)
        grid.paste(image, (left, top))
        text = _shorten(label, font=font, width=width * factor)
        draw.text((left, top + image.height + GAP // 2), text, fill="black", font=font)
    return grid


def _shorten(text: str, *, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    lengths = range(len(text), 0, -1)
    return next((f"{text[:length]}…" for length in lengths if font.getlength(f"{text[:length]}…") <= width), "…")


def _load_font() -> ImageFont.FreeTypeFont:
    """Load matplotlib's font: PIL's own has Latin letters only."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", TEXT)
