"""Packing keeps every byte, and names the images and folders that it cannot pack."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from data.shards import sources
from data.shards.dataset import Dataset
from data.shards.images import UnreadableImage
from data.shards.pack import Packed, PackSettings, pack
from data.shards.parallel import available_cores
from tests.support.images import make_folder, make_jpeg


def pack_folder(root: Path, out: Path, **options: object) -> Packed:
    source = sources.folder(root, "images", val_fraction=0.25, seed=0)
    return pack(source, out, settings=PackSettings(**{"shard_samples": 5, **options}))


def read_by_webdataset(dataset: Dataset) -> dict[str, dict[str, bytes]]:
    """Read every sample with webdataset, by key."""
    tars = sorted(str(path) for path in dataset.root.glob("*.tar"))
    samples = list(wds.WebDataset(tars, shardshuffle=False))
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    return {sample["__key__"]: sample for sample in samples}


def test_webdataset_reads_the_packed_bytes(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", classes=4, images=8)
    dataset = pack_folder(root, tmp_path / "packed").dataset
    samples = read_by_webdataset(dataset)
    assert len(samples) == 32
    for key, sample in samples.items():
        assert sample["jpg"] == (root / f"{key}.jpg").read_bytes()
        assert dataset.classes[int(sample["cls"])] == key.split("/")[0]


def test_the_same_images_and_seed_give_the_same_bytes(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    packed = [pack_folder(root, tmp_path / name, seed=seed).dataset for name, seed in [("a", 1), ("b", 1), ("c", 2)]]
    tars = [{path.name: path.read_bytes() for path in dataset.root.glob("*.tar")} for dataset in packed]
    assert len(tars[0]) == 6
    assert tars[0] == tars[1]
    assert tars[0] != tars[2]
    assert packed[0].splits == packed[1].splits


def test_many_workers_write_the_same_bytes_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "images")
    alone = pack_folder(root, tmp_path / "alone").dataset
    monkeypatch.setattr("data.shards.pack.POOL_IMAGES", 0)
    together = pack_folder(root, tmp_path / "together").dataset
    assert alone.splits == together.splits


def test_the_manifest_describes_the_tars(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    dataset = pack_folder(root, tmp_path / "packed").dataset
    manifest = json.loads((tmp_path / "packed" / "dataset.json").read_text())
    assert manifest["classes"] == ["class0", "class1", "class2"]
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    assert len(shards) == 6
    for shard in shards:
        content = (dataset.root / shard["file"]).read_bytes()
        assert shard["bytes"] == len(content)
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()
        with tarfile.open(dataset.root / shard["file"]) as tar:
            assert shard["samples"] == len(tar.getnames()) / 2
    assert not list(tmp_path.glob(".*"))


def test_mean_and_deviation_are_those_of_the_training_pixels(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    dataset = pack_folder(root, tmp_path / "packed").dataset
    keys = [key.partition(": ")[2] for key in dataset.index("train").keys(range(dataset.splits["train"].samples))]
    assert len(keys) == 18
    pixels = np.concatenate([np.asarray(Image.open(root / f"{key}.jpg")).reshape(-1, 3) for key in keys]) / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(dataset.std, pixels.std(axis=0), atol=1e-6)


def test_a_quarter_of_each_class_is_split_off(tmp_path: Path) -> None:
    dataset = pack_folder(make_folder(tmp_path / "images", images=8), tmp_path / "packed").dataset
    for split, count in (("train", 6), ("val", 2)):
        index = dataset.index(split)
        assert np.bincount(index.rows(np.arange(len(index))).label).tolist() == [count] * 3


def test_split_folders_are_the_splits(tmp_path: Path) -> None:
    for split, images in (("train", 6), ("validation", 3), ("test", 2)):
        make_folder(tmp_path / "images" / split, images=images)
    dataset = pack_folder(tmp_path / "images", tmp_path / "packed").dataset
    assert {name: split.samples for name, split in dataset.splits.items()} == {"train": 18, "val": 9, "test": 6}


def test_test_images_alone_are_a_split_to_evaluate(tmp_path: Path) -> None:
    make_folder(tmp_path / "images" / "test", images=5)
    dataset = pack_folder(tmp_path / "images", tmp_path / "packed").dataset
    assert {name: split.samples for name, split in dataset.splits.items()} == {"test": 15}
    assert dataset.classes == ("class0", "class1", "class2")
    assert min(dataset.std) > 0.01, "of these images"


def test_val_may_be_the_name_of_a_class(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    (root / "class1").rename(root / "val")
    assert pack_folder(root, tmp_path / "packed").dataset.classes == ("class0", "class2", "val")


def test_a_training_folder_alone_is_split(tmp_path: Path) -> None:
    make_folder(tmp_path / "images" / "train")
    dataset = pack_folder(tmp_path / "images", tmp_path / "packed").dataset
    assert dataset.classes == ("class0", "class1", "class2")
    assert {name: split.samples for name, split in dataset.splits.items()} == {"train": 18, "val": 6}


def test_keys_have_no_dots_and_do_not_collide(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", classes=2, images=2)
    (root / "class0" / "deep.er").mkdir()
    (root / "class0").rename(root / "__class0__")  # a name that webdataset skips
    for name in ("a.b.jpg", "a_b.jpg", "a_b.JPEG", "deep.er/ümlaut.jpg"):
        (root / "__class0__" / name).write_bytes(make_jpeg(20, 20, seed=len(name)))
    keys = read_by_webdataset(pack_folder(root, tmp_path / "packed").dataset).keys()
    assert {"class0__/a_b", "class0__/a_b-2", "class0__/a_b-3", "class0__/deep.er/ümlaut"} < keys
    assert len(keys) == 8


def test_damaged_images_are_skipped_and_named(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    intact = (root / "class1" / "03.jpg").read_bytes()
    (root / "class1" / "03.jpg").write_bytes(intact[: len(intact) // 2])
    (root / "class1" / "04.jpg").write_bytes(b"")
    (root / "class2" / "05.jpg").write_bytes(b"<html>not found</html>")
    (root / "class2" / "notes.txt").write_text("not an image")
    packed = pack_folder(root, tmp_path / "packed")
    reasons = {Path(sample.name).relative_to(root).as_posix(): sample.reason for sample in packed.skipped}
    assert reasons.keys() == {"class1/03.jpg", "class1/04.jpg", "class2/05.jpg"}
    assert "truncated" in reasons["class1/03.jpg"]
    assert reasons["class1/04.jpg"] == "the file is empty"
    assert sum(split.samples for split in packed.dataset.splits.values()) == 21
    assert packed.ignored == {".txt": 1}
    with pytest.raises(UnreadableImage, match=r"class[12]/0[345].jpg"):
        pack_folder(root, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_tiny_images_are_packed(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", size=(3, 5))
    assert pack_folder(root, tmp_path / "packed").skipped == []


def test_a_class_of_damaged_images_is_named(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    for path in (root / "class1").iterdir():
        path.write_bytes(b"\xff\xd8 cut")
    with pytest.raises(ValueError, match="class class1 has no readable image in split train"):
        pack_folder(root, tmp_path / "packed")


def test_resize_shrinks_only_larger_images(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", size=(40, 56))
    (root / "class0" / "small.jpg").write_bytes(make_jpeg(20, 24))
    samples = read_by_webdataset(pack_folder(root, tmp_path / "packed", resize=30).dataset)
    (tmp_path / "one.jpg").write_bytes(samples["class0/00"]["jpg"])
    assert Image.open(tmp_path / "one.jpg").size == (42, 30)
    assert samples["class0/small"]["jpg"] == (root / "class0" / "small.jpg").read_bytes()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: None, "contains no class folders"),
        (lambda root: (root / "cat").mkdir(), "class cat has no images"),
        (lambda root: [make_folder(root / name) for name in ("train", "val", "valid")], "val and .*valid are both"),
        (lambda root: make_folder(root, classes=1), "images has one class, class0: a classifier needs at least 2"),
        (lambda root: make_folder(root / "train") and make_folder(root / "val", classes=4), "class3 is a class that"),
    ],
)
def test_an_invalid_source_folder_is_rejected(tmp_path: Path, prepare: object, message: str) -> None:
    root = tmp_path / "images"
    root.mkdir()
    prepare(root)
    with pytest.raises(ValueError, match=message):
        pack_folder(root, tmp_path / "packed")


@pytest.mark.parametrize("resize", ["big", 0, 2.5])
def test_an_invalid_resize_is_rejected(tmp_path: Path, resize: object) -> None:
    root = make_folder(tmp_path / "images")
    with pytest.raises(ValueError, match=f"resize={resize} must be an integer of at least 1 pixel"):
        pack_folder(root, tmp_path / "packed", resize=resize)


def test_available_cores_respect_the_quota_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr("data.shards.parallel.CPU_QUOTA", quota)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    assert available_cores() == 8
    for text, cores in (("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8)):
        quota.write_text(text + "\n")
        assert available_cores() == cores


def test_an_existing_data_set_is_not_overwritten(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    pack_folder(root, tmp_path / "packed")
    with pytest.raises(FileExistsError, match="packed exists"):
        pack_folder(root, tmp_path / "packed")
