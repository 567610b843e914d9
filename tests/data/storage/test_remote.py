"""Tars in object stores: the bytes, the index and the errors, against the local files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data.augment.augmentation import Augmentation
from data.augment.crops import TrainingCrop
from data.loading.decoder import DecodeSettings
from data.loading.loader import TrainingLoader
from data.loading.order import TrainingPlan
from data.shards.dataset import Dataset
from data.shards.indexing import open_dataset
from data.shards.remote_index import load_versions
from data.storage.local import Request
from data.storage.location import Url, parse_root
from data.storage.open import open_storage
from data.storage.remote import RemoteShards
from tests.support.stores import S3, nginx


def read_all(root: str, dataset: Dataset) -> dict[str, bytes]:
    """Read every tar of a data set as one request each."""
    storage, buffers = open_storage(Url(root), dataset.shard_bytes), {}
    for file, size in dataset.shard_bytes.items():
        buffers[file] = np.empty(size, np.uint8)
    storage.read_batch([Request(file, 0, into) for file, into in buffers.items()])
    return {file: into.tobytes() for file, into in buffers.items()}


def loader_of(dataset: Dataset) -> TrainingLoader:
    index, decode = dataset.index("train"), DecodeSettings(dataset.mean, dataset.std)
    plan = TrainingPlan(index.shard_samples, seed=0, shuffle_window=8, batch_size=4)
    storage = open_storage(dataset.root, dataset.shard_bytes)
    return TrainingLoader(index, storage, plan=plan, augment=Augmentation(TrainingCrop(32)), decode=decode)


def test_a_packed_data_set_is_the_same_in_s3(tmp_path: Path, remote: str, photographs: Dataset) -> None:
    dataset, skipped = open_dataset(Url(remote), tmp_path / "index")
    assert skipped == []
    assert dataset.splits == photographs.splits  # files, sizes and digests
    assert (dataset.name, dataset.classes, dataset.mean) == (photographs.name, photographs.classes, photographs.mean)
    expected = {file: (photographs.root / file).read_bytes() for file in photographs.shard_bytes}
    assert len(expected) > 3
    assert read_all(remote, dataset) == expected


def test_tars_without_a_manifest_are_indexed_by_streaming_them(
    tmp_path: Path, s3: S3, bucket: str, photographs: Dataset
) -> None:
    root = s3.upload(photographs.root, bucket, only="*.tar")
    dataset, _ = open_dataset(Url(root), tmp_path / "index")
    shutil.copytree(photographs.root, tmp_path / "local", ignore=shutil.ignore_patterns("*.json", "*.parquet"))
    local, _ = open_dataset(tmp_path / "local")
    assert {name: split.digest for name, split in dataset.splits.items()} == {
        name: split.digest for name, split in local.splits.items()
    }
    assert dataset.classes == local.classes
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [
        ".lock", "dataset.json", "train.parquet", "val.parquet", "versions.json",
    ]  # fmt: skip


def test_kept_versions_are_used_only_for_the_tars_of_the_index(
    tmp_path: Path, s3: S3, bucket: str, remote: str, photographs: Dataset
) -> None:
    dataset, _ = open_dataset(Url(remote), tmp_path)
    kept = load_versions(dataset, label_field="label")
    assert kept is not None
    assert {file: version.size for file, version in kept.items()} == photographs.shard_bytes
    assert load_versions(dataset, label_field="species") is None
    file = photographs.splits["train"].shards[0].file
    s3.put(bucket, f"data/{file}", (photographs.root / photographs.splits["train"].shards[1].file).read_bytes())
    changed, _ = open_dataset(Url(remote), tmp_path)
    assert load_versions(dataset, label_field="label") is None  # those of the earlier tars
    after = load_versions(changed, label_field="label")
    assert after is not None
    assert [name for name in after if after[name] != kept[name]] == [file]
    for content in ("", "[]", '{"train": 1}', '{"train": {"a.tar": 1}}'):
        (tmp_path / "versions.json").write_text(content)
        assert load_versions(changed, label_field="label") is None


def test_batches_are_those_of_local_files(tmp_path: Path, remote: str, photographs: Dataset) -> None:
    dataset, _ = open_dataset(Url(remote), tmp_path / "index")
    for here, there in zip(loader_of(photographs), loader_of(dataset), strict=True):
        assert torch.equal(here.images, there.images)
        assert torch.equal(here.samples, there.samples)


def test_an_opened_index_is_read_again_only_after_a_change(
    tmp_path: Path, s3: S3, bucket: str, photographs: Dataset
) -> None:
    root, folder = s3.upload(photographs.root, bucket, only="*.tar"), tmp_path / "index"
    open_dataset(Url(root), folder)
    written = (folder / "train.parquet").stat().st_mtime_ns
    open_dataset(Url(root), folder)
    assert (folder / "train.parquet").stat().st_mtime_ns == written
    file = photographs.splits["train"].shards[0].file
    s3.put(bucket, f"data/{file}", (photographs.root / file).read_bytes())
    open_dataset(Url(root), folder)
    assert (folder / "train.parquet").stat().st_mtime_ns == written  # the same bytes have the same ETag
    other = photographs.splits["train"].shards[1].file
    s3.put(bucket, f"data/{file}", (photographs.root / other).read_bytes())
    before = open_dataset(photographs.root)[0].splits["train"].digest
    assert open_dataset(Url(root), folder)[0].splits["train"].digest != before


def test_a_manifest_beside_other_tars_is_not_used(tmp_path: Path, s3: S3, bucket: str, photographs: Dataset) -> None:
    root = s3.upload(photographs.root, bucket)
    first, second = photographs.splits["train"].shards[:2]
    s3.put(bucket, f"data/{first.file}", (photographs.root / second.file).read_bytes())
    assert first.bytes != second.bytes
    dataset, _ = open_dataset(Url(root), tmp_path / "index")
    assert dataset.splits["train"].digest != photographs.splits["train"].digest
    assert dataset.shard_bytes[first.file] == second.bytes


def test_a_web_server_serves_a_packed_data_set(tmp_path: Path, photographs: Dataset) -> None:
    with nginx(photographs.root, tmp_path) as url:
        dataset, _ = open_dataset(Url(url), tmp_path / "index")
        assert dataset.splits == photographs.splits
        expected = {file: (photographs.root / file).read_bytes() for file in photographs.shard_bytes}
        assert read_all(url, dataset) == expected
        problem = "/none has no dataset.json, and a web server lists no tars"
        with pytest.raises(ValueError, match=f"root={url}{problem}"):
            open_dataset(Url(f"{url}/none"), tmp_path / "other")
        with pytest.raises(ValueError, match=r"/denied/dataset.json may not be read \(403\): check who may read it"):
            open_dataset(Url(f"{url}/denied"), tmp_path / "other")


def test_a_short_range_is_an_error_that_names_the_object(remote: str, photographs: Dataset) -> None:
    file, size = next(iter(photographs.shard_bytes.items()))
    shards, into = RemoteShards(Url(remote)), np.empty(100, np.uint8)
    end = f"{remote}/{file} ends before byte {size + 50}: it changed after it was indexed"
    with pytest.raises(ValueError, match=end):
        shards.read_batch([Request(file, size - 50, into)])
    with pytest.raises(ValueError, match=f"{remote}/{file} ends before its index does"):
        shards.read_batch([Request(file, size + 50, into)])
    with pytest.raises(FileNotFoundError, match=f"^{remote}/none.tar does not exist: upload it"):
        shards.read_batch([Request("none.tar", 0, into)])


def test_more_requests_than_are_in_flight_are_all_read(remote: str, photographs: Dataset) -> None:
    file, size = next(iter(photographs.shard_bytes.items()))
    content = (photographs.root / file).read_bytes()
    requests = [Request(file, offset, np.empty(10, np.uint8)) for offset in range(0, size - 10, size // 50)]
    assert len(requests) > 40
    RemoteShards(Url(remote), inflight=3).read_batch(requests)
    assert all(one.into.tobytes() == content[one.offset : one.offset + 10] for one in requests)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("ftp://host/folder", "root=ftp://host/folder is not a URL of s3://, gs://"),
        ("s3://", "root=s3:// is not a URL of"),
        ("https://me:hunter2@host/folder", "root=https://host has a password or a signature"),
        ("https://host/folder?sig=hunter2", "root=https://host has a password or a signature"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused(text: str, answer: str) -> None:
    with pytest.raises(ValueError, match=answer) as error:
        parse_root(text)
    assert "hunter2" not in str(error.value)


def test_a_url_needs_a_folder_for_its_index(remote: str) -> None:
    with pytest.raises(ValueError, match=f"root={remote} is a URL: folder=FOLDER keeps manifest and index here"):
        open_dataset(Url(remote))
