"""What packing accepts, against what DALI decodes."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from data.loading.graph import can_decode
from data.shards.images import UnreadableImage, intact_size, oriented_size
from tests.support.images import make_jpeg

SHORT, LONG, BYTE = 3, 4, 1


@pytest.mark.parametrize("missing", [0, 1, 4, 8, 12])
def test_a_png_without_its_end_is_refused_as_by_dali(missing: int) -> None:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(make_jpeg(20, 30))).save(buffer, "PNG")
    encoded = buffer.getvalue()[: len(buffer.getvalue()) - missing]
    assert can_decode(np.frombuffer(encoded, np.uint8), reach=(20, 30)) is (missing == 0)
    if missing == 0:
        assert intact_size(encoded) == intact_size(encoded + b"more") == (20, 30)
        return
    with pytest.raises(UnreadableImage, match=r"^the end of the PNG is missing$"):
        intact_size(encoded)


@pytest.mark.parametrize(
    ("order", "kind", "size"),
    [("<", SHORT, (30, 20)), (">", SHORT, (30, 20)), ("<", LONG, (30, 20)), (">", LONG, None), ("<", BYTE, None)],
)
def test_an_orientation_that_dali_reads_otherwise_is_refused(
    order: str, kind: int, size: tuple[int, int] | None
) -> None:
    value = {SHORT: ("HH", 6, 0), LONG: ("I", 6), BYTE: ("BBBB", 6, 0, 0, 0)}[kind]
    entry = struct.pack(f"{order}HHI{value[0]}", 0x0112, kind, 1, *value[1:])
    block = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HIH", 42, 8, 1) + entry + bytes(4)
    encoded = make_jpeg(20, 30, exif=b"Exif\0\0" + block)
    if size is None:
        with pytest.raises(UnreadableImage, match=r"^its EXIF orientation is not a 16-bit number$"):
            oriented_size(encoded)
        return
    assert oriented_size(encoded) == size
    assert can_decode(np.frombuffer(encoded, np.uint8), reach=size)
