"""WebDataset tars as others write them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from tests.support.images import make_jpeg


def write_tar(path: Path, files: dict[str, bytes], **options: int) -> Path:
    """Write a tar with Python's own writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def make_samples(count: int, *, classes: int = 3, prefix: str = "") -> dict[str, bytes]:
    """Make samples in the usual layout: a .jpg and a .cls each."""
    files = {}
    for number in range(count):
        files[f"{prefix}{number:05d}.jpg"] = make_jpeg(20 + number, 30, seed=number)
        files[f"{prefix}{number:05d}.cls"] = str(number % classes).encode()
    return files
