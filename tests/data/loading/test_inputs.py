"""What a user may point to, and the images that are found there."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
import webdataset

from data.loading.inputs import find_images, split_sources
from data.shards.dataset import Dataset
from tests.support.images import make_folder


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    root = make_folder(Path("photos"), classes=2, images=2)
    (root / "notes.txt").write_text("no image")
    (root / "class0" / "00.jpg").rename(root / "class0" / "A [1].JPEG")
    return root


def names(text: str, lines: tuple[str, ...] = ()) -> list[str]:
    return [source.name for source in find_images(text, lines=lines)]


def test_files_folders_patterns_and_lists(photos: Path) -> None:
    everything = [f"photos/{one}" for one in ("class0/01.jpg", "class0/A [1].JPEG", "class1/00.jpg", "class1/01.jpg")]
    assert names("photos") == everything
    assert names("photos/**/*.jpg") == [everything[0], *everything[2:]]
    assert names("photos/class0/A [1].JPEG") == [everything[1]]
    assert names("-", ("a.jpg\n", "\n", "b c.png\r\n")) == ["a.jpg", "b c.png"]
    assert [source.read() for source in find_images("photos", lines=())] == [
        Path(one).read_bytes() for one in everything
    ]


def test_images_in_tars_are_read_in_place(photos: Path) -> None:
    with tarfile.open("shard.tar", "w") as tar:
        tar.add(photos / "class1" / "00.jpg", "0001.jpg")
        tar.add(photos / "notes.txt", "0001.txt")
        tar.add(photos / "class1" / "01.jpg", "x/0002.jpg")
    found = list(find_images("shard.tar", lines=()))
    assert [source.name for source in found] == ["shard.tar/0001.jpg", "shard.tar/x/0002.jpg"]
    assert [source.read() for source in found] == [(photos / f"class1/0{one}.jpg").read_bytes() for one in (0, 1)]
    os.truncate("shard.tar", 1000)
    with pytest.raises(ValueError, match=r"^shard.tar ends before byte"):
        found[1].read()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere", "^input=nowhere does not exist$"),
        ("", "^input= is empty: give a file, a folder or a pattern$"),
        ("photos/*.gif", r"^input=photos/\*\.gif matches nothing$"),
        ("empty", "^input=empty has no image: jpg, jpeg, png, webp, or tars of them$"),
    ],
)
def test_a_place_without_images_is_said_at_once(photos: Path, text: str, message: str) -> None:
    Path("empty").mkdir()
    with pytest.raises(ValueError, match=message):
        find_images(text, lines=())


def test_a_split_has_the_bytes_and_labels_that_webdataset_reads(photographs: Dataset) -> None:
    tars = [str(photographs.root / shard.file) for shard in photographs.splits["val"].shards]
    expected = [(sample["jpg"], int(sample["cls"])) for sample in webdataset.WebDataset(tars, shardshuffle=False)]
    assert len(tars) > 1
    found = split_sources(photographs, "val")
    assert [(source.read(), label) for source, label in found] == expected
    spread = [label for _, label in split_sources(photographs, "val", limit=3)]
    assert spread == [expected[number][1] for number in (0, round((len(expected) - 1) / 2), len(expected) - 1)]
