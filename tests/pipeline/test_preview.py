"""The preview verb as it is typed: the images of a training, drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.shards.dataset import Dataset
from pipeline import preview
from pipeline.pages.image_grid import GAP, TEXT, draw_grid
from tests.support.commands import call_verb

BASE = ["+model=lenet", "augment.training.scale=[1,1]", "augment.training.ratio=[1,1]", "count=12"]


def cells(file: Path, *, side: int, count: int) -> list[np.ndarray]:
    """The images of a picture, in their original size."""
    with Image.open(file) as picture:
        pixels = np.asarray(picture)
    factor = -(-112 // side)
    step = (side * factor + TEXT + 2 * GAP, side * factor + GAP)
    corners = [(GAP + number // 8 * step[0], GAP + number % 8 * step[1]) for number in range(count)]
    return [pixels[top : top + side * factor : factor, left : left + side * factor : factor] for top, left in corners]


def draw(*words: str) -> None:
    call_verb(preview.VERB, preview.main, [*BASE, *words])


def test_the_picture_has_the_images_of_a_training(
    with_digits: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(with_digits)
    draw("out=plain.png")
    assert "picture     plain.png" in capsys.readouterr().out
    draw("out=inverted.png", "policy=jitter", "augment.policy.brightness=0", "augment.policy.contrast=0",
         "augment.policy.saturation=0", "augment.policy.solarize=1")  # fmt: skip
    plain, changed = cells(Path("plain.png"), side=32, count=12), cells(Path("inverted.png"), side=32, count=12)
    assert len({image.tobytes() for image in plain}) == 12
    for before, after in zip(plain, changed, strict=True):
        expected = np.where(before >= 128, 255 - before, before)
        assert int(np.abs(after.astype(int) - expected).max()) <= 1  # levels are rounded after the normalisation
    draw("out=later.png", "epoch=1")
    assert not np.array_equal(cells(Path("later.png"), side=32, count=12), plain)


def test_a_file_that_is_no_picture_is_refused(with_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(with_digits)
    with pytest.raises(ValueError, match=r"out=page.html must end in one of .png, .jpg, .jpeg"):
        draw("out=page.html")


def test_labels_are_cut_to_the_width_of_an_image() -> None:
    images = np.zeros((9, 40, 60, 3), np.uint8)
    narrow = draw_grid(images, ["cat"] * 9)
    wide = draw_grid(images, [f"{'long ' * 40}{number}" for number in range(9)])
    assert narrow.size == wide.size == (8 * (180 + GAP) + GAP, 2 * (120 + TEXT + 2 * GAP) + GAP)
