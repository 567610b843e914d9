"""Foreign tars: every kind of sample is read, every defect is named."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.shards import sources
from data.shards.dataset import Dataset
from data.shards.index_writer import statistics_shares
from data.shards.indexing import open_dataset
from data.shards.pack import pack
from tests.support.images import make_folder, make_jpeg, orientation
from tests.support.shards import make_samples, write_tar


def convert(image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(make_jpeg(20, 30))).save(buffer, image_format, **options)
    return buffer.getvalue()


def all_rows(dataset: Dataset, split: str) -> dict[str, list[int]]:
    index = dataset.index(split)
    return {name: column.tolist() for name, column in index.rows(np.arange(len(index)))._asdict().items()}


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_are_those_of_the_images(tmp_path: Path, tar_format: int) -> None:
    name = "x" * 90 + "/" + "ümlaut" if tar_format != tarfile.USTAR_FORMAT else "plain"
    files = {f"{name}{number}.{suffix}": content for number in range(3) for suffix, content in
             (("jpg", make_jpeg(20, 30, seed=number)), ("cls", b"1"))}  # fmt: skip
    tar = write_tar(tmp_path / "a.tar", files, format=tar_format)
    dataset, skipped = open_dataset(tmp_path)
    rows = all_rows(dataset, "train")
    assert skipped == []
    content = tar.read_bytes()
    images = [content[o : o + s] for o, s in zip(rows["offset"], rows["size"], strict=True)]
    assert images == [image for key, image in files.items() if key.endswith("jpg")]


def test_every_kind_of_image_and_label_is_read(tmp_path: Path) -> None:
    files = {
        "a.JPEG": make_jpeg(20, 30),
        "a.json": json.dumps({"label": 2, "caption": "c.a.t"}).encode(),
        "b.png": convert("PNG"),
        "b.cls": b"0\n",
        "c.WebP": convert("WEBP"),
        "c.cls": b"1",
        "d.jpg": make_jpeg(20, 30, exif=orientation(6)),
        "d.cls": b"1",
        "d.txt": b"ignored",
    }
    write_tar(tmp_path / "set-train-0.tar", files)
    dataset, skipped = open_dataset(tmp_path)
    rows = all_rows(dataset, "train")
    assert skipped == []
    assert rows["label"] == [2, 0, 1, 1]
    assert rows["height"] == [20, 20, 20, 30]  # the last one has an EXIF orientation
    assert rows["width"] == [30, 30, 30, 20]
    assert dataset.classes == ("0", "1", "2")


def test_labels_may_be_names_in_another_field(tmp_path: Path) -> None:
    files = {
        "a.jpg": make_jpeg(9, 9),
        "a.json": b'{"kind": "dog"}',
        "b.jpg": make_jpeg(9, 9),
        "b.json": b'{"kind": "cat"}',
    }
    write_tar(tmp_path / "a.tar", files)
    dataset, _ = open_dataset(tmp_path, label_field="kind")
    assert dataset.classes == ("cat", "dog")
    assert all_rows(dataset, "train")["label"] == [1, 0]


def test_names_determine_the_splits(tmp_path: Path) -> None:
    for name in ("train/0000.tar", "train/0001.tar", "imagenet-validation-00.tar", "testing/a.tar", "set_test_0.tar"):
        write_tar(tmp_path / name, make_samples(3))
    dataset, _ = open_dataset(tmp_path)
    assert {name: split.samples for name, split in dataset.splits.items()} == {"train": 6, "val": 3, "test": 6}


def test_tars_are_indexed_once_and_again_when_one_changes(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "train-0.tar", make_samples(4))
    first, _ = open_dataset(tmp_path)
    stamp = (tmp_path / "train.parquet").stat().st_mtime_ns
    again, _ = open_dataset(tmp_path)
    assert again == first
    assert (tmp_path / "train.parquet").stat().st_mtime_ns == stamp
    os.utime(tar, ns=(0, 0))
    assert open_dataset(tmp_path)[0] == first
    assert (tmp_path / "train.parquet").stat().st_mtime_ns > stamp
    write_tar(tmp_path / "train-1.tar", make_samples(2))
    assert len(open_dataset(tmp_path)[0].index("train")) == 6


def test_another_label_field_makes_another_index(tmp_path: Path) -> None:
    files = {}
    for number in range(4):
        files[f"{number}.jpg"] = make_jpeg(9, 9, seed=number)
        files[f"{number}.json"] = json.dumps({"coarse": number // 2, "fine": number}).encode()
    write_tar(tmp_path / "a.tar", files)
    labels = [all_rows(open_dataset(tmp_path, label_field=name)[0], "train")["label"] for name in ("coarse", "fine")]
    assert labels == [[0, 0, 1, 1], [0, 1, 2, 3]]


def test_tars_may_gain_a_class_and_packed_names_stay(tmp_path: Path) -> None:
    write_tar(tmp_path / "foreign" / "a.tar", make_samples(4, classes=2))
    assert open_dataset(tmp_path / "foreign")[0].classes == ("0", "1")
    write_tar(tmp_path / "foreign" / "b.tar", make_samples(6, classes=3, prefix="b"))
    assert open_dataset(tmp_path / "foreign")[0].classes == ("0", "1", "2")
    source = sources.folder(make_folder(tmp_path / "images"), "ours", val_fraction=0.0, seed=0)
    packed = pack(source, tmp_path / "ours").dataset
    os.utime(tmp_path / "ours" / "train-000000.tar", ns=(0, 0))
    again, _ = open_dataset(tmp_path / "ours")
    assert (again.name, again.classes) == ("ours", packed.classes)


def test_an_index_without_its_manifest_is_not_current(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "train-0.tar", make_samples(4))
    open_dataset(tmp_path)
    manifest = (tmp_path / "dataset.json").read_bytes()
    write_tar(tar, make_samples(6))
    complete, _ = open_dataset(tmp_path)
    (tmp_path / "dataset.json").write_bytes(manifest)  # as if the process had died between index and manifest
    assert open_dataset(tmp_path)[0] == complete
    assert len(complete.index("train")) == 6


def test_opening_a_current_data_set_writes_nothing(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", make_samples(4))
    open_dataset(tmp_path)
    (tmp_path / ".lock").unlink(missing_ok=True)
    open_dataset(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset.json", "train-0.tar", "train.parquet"]


def test_reserved_names_are_ignored_and_repeated_ones_reported(tmp_path: Path) -> None:
    files = make_samples(2) | {"__meta__/info.json": b"{}", "__init.jpg": make_jpeg(9, 9), "__init.cls": b"1"}
    tar = write_tar(tmp_path / "a.tar", files)
    with tarfile.open(tar, "a") as more:
        member = tarfile.TarInfo("00000.JPG")
        member.size = 3
        more.addfile(member, io.BytesIO(b"abc"))
    dataset, skipped = open_dataset(tmp_path)
    assert len(dataset.index("train")) == 3
    assert [(Path(sample.name).name, sample.reason) for sample in skipped] == [
        ("a.tar: 00000.JPG", "a second file of this name: the first is used")
    ]


@pytest.mark.parametrize("num_shards", [1, 3, 7, 10_000, 25_000])
def test_statistics_use_ten_thousand_images_at_most(num_shards: int) -> None:
    shares = statistics_shares(num_shards)
    assert len(shares) == num_shards
    assert sum(shares) == 10_000
    assert max(shares) - min(shares) <= 1


def test_the_index_may_be_in_another_folder(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars" / "train-0.tar", make_samples(4))
    dataset, _ = open_dataset(tmp_path / "tars", tmp_path / "index")
    assert len(dataset.index("train")) == 4
    assert [path.name for path in (tmp_path / "tars").iterdir()] == ["train-0.tar"]


def test_unusable_samples_are_skipped_and_named(tmp_path: Path) -> None:
    files = make_samples(4) | {
        "broken.jpg": b"\xff\xd8 no more", "broken.cls": b"1", "blind.cls": b"1",
        "cut.jpg": make_jpeg(90, 90)[:-2000], "cut.cls": b"1",
        "none.jpg": make_jpeg(9, 9), "none.json": b'{"label": null}',
        "nameless.jpg": make_jpeg(9, 9), "other.jpg": make_jpeg(9, 9), "other.json": b'{"kind": 1}',
    }  # fmt: skip
    write_tar(tmp_path / "a.tar", files)
    dataset, skipped = open_dataset(tmp_path)
    assert len(dataset.index("train")) == 4
    reasons = {sample.name.partition(": ")[2]: sample.reason for sample in skipped}
    assert reasons.keys() == {"broken", "cut", "blind", "nameless", "other", "none"}
    assert "truncated" in reasons["cut"]
    assert reasons["none"] == "its label null is neither an integer nor a name"
    assert "no field label" in reasons["other"]
    assert [sample.name.rpartition(": ")[2] for sample in skipped if sample.lacks_label_field] == ["other"]
    assert "neither a .cls nor a .json" in reasons["nameless"]


@pytest.mark.parametrize("cut", [700, 5000, -11_000])
def test_a_tar_cut_short_is_named(tmp_path: Path, cut: int) -> None:
    tar = write_tar(tmp_path / "a.tar", make_samples(8))
    tar.write_bytes(tar.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"a\.tar is damaged or cut short"):
        open_dataset(tmp_path)


def test_a_tar_cut_between_two_files_is_named(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", make_samples(8))
    with tarfile.open(tar) as complete:
        end_of_last = complete.getmembers()[-1].offset_data + 512
    tar.write_bytes(tar.read_bytes()[:end_of_last])
    with tarfile.open(tar) as cut:
        assert len(cut.getnames()) == 16, "Python does not notice"
    with pytest.raises(ValueError, match=r"a\.tar is damaged or cut short"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("label", ["-1", "1000000000"])
def test_a_label_out_of_range_is_named(tmp_path: Path, label: str) -> None:
    write_tar(tmp_path / "a.tar", make_samples(4) | {"odd.jpg": make_jpeg(9, 9), "odd.cls": label.encode()})
    with pytest.raises(ValueError, match=rf"odd has label {label}, outside"):
        open_dataset(tmp_path)


def test_names_and_numbers_in_different_tars_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", make_samples(4))
    write_tar(tmp_path / "b.tar", {"odd.jpg": make_jpeg(9, 9), "odd.cls": b"cat"})
    with pytest.raises(ValueError, match=r"b.tar: odd has the label cat where others have numbers"):
        open_dataset(tmp_path)


def test_a_label_that_training_does_not_have_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", make_samples(6))
    write_tar(tmp_path / "val.tar", make_samples(6) | {"odd.jpg": make_jpeg(9, 9), "odd.cls": b"3"})
    with pytest.raises(ValueError, match="odd has label 3, outside 0 to 2"):
        open_dataset(tmp_path)


def test_anything_else_is_rejected_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither dataset.json nor a .tar file"):
        open_dataset(tmp_path)
    write_tar(tmp_path / "gz" / "a.tar.gz", make_samples(2))
    with pytest.raises(ValueError, match=r"a.tar.gz is compressed.*unpack it"):
        open_dataset(tmp_path / "gz")
    for path in ("gz/a.tar.gz", "nowhere"):
        with pytest.raises(ValueError, match=f"root=.*{path} is not a folder: give the one that contains the tars"):
            open_dataset(tmp_path / path)
    (tmp_path / "gz" / "a.tar.gz").unlink()
    write_tar(tmp_path / "a.tar", {"readme.txt": b"nothing here"})
    with pytest.raises(ValueError, match="no image with a label"):
        open_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        open_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match="not the manifest"):
        open_dataset(tmp_path)


def test_a_listed_tar_that_is_missing_is_named(photographs: Dataset, tmp_path: Path) -> None:
    root = shutil.copytree(photographs.root, tmp_path / "packed")
    first = next(iter(photographs.splits["train"].shards)).file
    (root / first).rename(root / "elsewhere")
    before = (root / "dataset.json").read_bytes()
    with pytest.raises(ValueError, match=rf"^root={root} lacks {first}, listed in {root}/dataset.json: restore it"):
        open_dataset(root)
    assert (root / "dataset.json").read_bytes() == before
