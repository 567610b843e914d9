"""Images of every kind that people train on, encoded, and small data sets of them."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from data.shards import sources
from data.shards.dataset import Dataset
from data.shards.pack import PackSettings, pack

SIZES = [(97, 131), (64, 64), (240, 181), (33, 200)]  # rows and columns
JPEG = {
    "JPEG 4:4:4": {"subsampling": 0},
    "JPEG 4:2:2": {"subsampling": 1},
    "JPEG 4:2:0": {"subsampling": 2},
    "JPEG progressive": {"subsampling": 2, "progressive": True},
}
DIFFERENT, QUALITY = 200, 97
ADOBE = b"\xff\xee"  # the marker without which the colours of CMYK are ambiguous


def photograph(height: int, width: int, *, seed: int) -> Image.Image:
    """A smooth random image with coloured edges, whose chroma decoders round differently."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(smooth).copy()
    pixels[height // 3 : height // 2, width // 3 : width // 2] = (255, 0, 0)
    return Image.fromarray(pixels)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """Encode an image."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def groups() -> dict[str, list[bytes]]:
    """Encoded images by kind."""
    images = [photograph(*size, seed=number) for number, size in enumerate(SIZES)]
    made = {name: [encode(one, "JPEG", quality=90, **options) for one in images] for name, options in JPEG.items()}
    made["JPEG grey"] = [encode(one.convert("L"), "JPEG", quality=90) for one in images]
    made["JPEG EXIF"] = [encode(images[0], "JPEG", quality=90, exif=_orientation(value)) for value in range(1, 9)]
    cmyk = [encode(one.convert("CMYK"), "JPEG", quality=90) for one in images]
    made["JPEG CMYK"], made["JPEG CMYK, no Adobe"] = cmyk, [_without_adobe(one) for one in cmyk]
    made["JPEG YCCK"] = [_as_ycck(one) for one in cmyk]
    for mode in ("RGB", "L", "P", "RGBA"):
        made[f"PNG {mode}"] = [encode(one.convert(mode), "PNG") for one in images]
    made["WebP lossy"] = [encode(one, "WEBP", quality=90) for one in images]
    made["WebP lossless"] = [encode(one, "WEBP", lossless=True) for one in images]
    return made


def jpegs(count: int, *, height: int = 375, width: int = 500) -> list[bytes]:
    """JPEGs of the size of ImageNet's, 110 KB each; after DIFFERENT ones they repeat."""
    different = min(count, DIFFERENT)
    made = [encode(photograph(height, width, seed=number), "JPEG", quality=QUALITY) for number in range(different)]
    return [made[number % different] for number in range(count)]


def make_dataset(folder: Path, count: int, *, num_classes: int = 10, height: int = 375, width: int = 500) -> Dataset:
    """Pack JPEGs of some classes."""
    for number, encoded in enumerate(jpegs(count, height=height, width=width)):
        path = folder / "images" / f"class{number % num_classes}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
    source = sources.folder(folder / "images", "checks", val_fraction=0.1, seed=0)
    return pack(source, folder / "packed", settings=PackSettings(shard_samples=500)).dataset


def _orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


def _as_ycck(encoded: bytes) -> bytes:
    """A CMYK image whose Adobe marker declares YCCK: other colours, in a valid file."""
    transform = encoded.index(ADOBE) + 15
    return encoded[:transform] + b"\x02" + encoded[transform + 1 :]


def _without_adobe(encoded: bytes) -> bytes:
    start = encoded.index(ADOBE)
    length = int.from_bytes(encoded[start + 2 : start + 4], "big")
    return encoded[:start] + encoded[start + 2 + length :]
