"""Batches against PIL's decoder and torchvision's resize, and errors for files that changed."""

from __future__ import annotations

import itertools
import shutil
import tarfile
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as reference
from torchvision.transforms.v2 import functional as v2

from data.augment.augmentation import Augmentation
from data.augment.crops import EvaluationCrop, TrainingCrop
from data.loading.decoder import DecodeSettings, GpuDecoder
from data.loading.graph import choose_resizer
from data.loading.loader import Batch, Loader, TrainingLoader
from data.loading.order import EvaluationPlan, TrainingPlan
from data.shards import sources
from data.shards.dataset import Dataset
from data.shards.indexing import open_dataset
from data.shards.pack import pack
from data.storage.local import LocalShards, Request
from tests.support.decoded import decode_by_pil, first_and_last, levels
from tests.support.loaders import training
from tests.support.paths import CIFAR


def evaluation(
    dataset: Dataset, split: str, *, image_size: int, crop_fraction: float, batch_size: int = 16, **ranks: int
) -> Loader:
    index, decode = dataset.index(split), DecodeSettings(dataset.mean, dataset.std)
    plan, crop = EvaluationPlan(len(index), batch_size, **ranks), EvaluationCrop(image_size, crop_fraction)
    return Loader(index, LocalShards(dataset.root), plan=plan, augment=Augmentation(crop), decode=decode)


def assert_equals_torchvision(dataset: Dataset, split: str, *, image_size: int, crop_fraction: float) -> None:
    batches = list(evaluation(dataset, split, image_size=image_size, crop_fraction=crop_fraction))
    images = torch.cat([batch.images for batch in batches])
    assert torch.cat([batch.samples for batch in batches]).tolist() == list(range(len(images)))
    samples = first_and_last(dataset, split)
    assert len(samples) >= len(dataset.classes)
    for sample in samples:
        image = decode_by_pil(dataset, split, sample)
        resized = reference.resize(image, [round(image_size / crop_fraction)], antialias=True)
        expected = np.asarray(reference.center_crop(resized, [image_size])).astype(float)
        assert np.abs(levels(dataset, images[sample : sample + 1])[0] - expected).max() < 1.001, sample


@pytest.mark.parametrize("split", ["train", "val"])
def test_photographs_equal_pil_and_torchvision(photographs: Dataset, split: str) -> None:
    assert_equals_torchvision(photographs, split, image_size=224, crop_fraction=0.875)
    assert_equals_torchvision(photographs, split, image_size=96, crop_fraction=0.9)


def test_digits_equal_pil_and_torchvision(digits: Dataset) -> None:
    assert_equals_torchvision(digits, "val", image_size=16, crop_fraction=1.0)


@pytest.mark.skipif(not CIFAR.is_file(), reason="needs the CIFAR-10 archive in ../shared/data")
def test_cifar_equals_pil_and_torchvision(tmp_path: Path) -> None:
    with tarfile.open(CIFAR) as archive:
        archive.extractall(tmp_path, filter="data")
    root = next(path for path in tmp_path.iterdir() if path.is_dir())
    for path in root.glob("*/*.jpg"):
        if int(path.stem) % 50:
            path.unlink()
    source = sources.folder(root, "cifar10", val_fraction=0.0, seed=0)
    dataset = pack(source, tmp_path / "packed").dataset
    assert_equals_torchvision(dataset, "train", image_size=32, crop_fraction=1.0)


@pytest.mark.parametrize(("name", "image_size"), [("digits", 16), ("photographs", 96)])
def test_a_training_image_equals_torchvisions_resized_crop(
    request: pytest.FixtureRequest, name: str, image_size: int
) -> None:
    dataset: Dataset = request.getfixturevalue(name)
    loader = training(dataset, image_size=image_size)
    batches = list(itertools.islice(loader, 3))
    assert len(batches) == 3
    for batch in batches:
        rows = loader.index.rows(batch.samples.numpy())
        sizes = np.stack([rows.height, rows.width], axis=1).astype(np.int64)
        crops = loader.augment.crop.crops(sizes, batch.samples.numpy(), seed=0, epoch=0)
        for position, sample in enumerate(batch.samples.tolist()):
            corner, shape = crops.anchor[position].tolist(), crops.shape[position].tolist()
            image = v2.pil_to_tensor(decode_by_pil(dataset, "train", sample))
            expected = v2.resized_crop(image, *corner, *shape, [image_size, image_size], antialias=True)
            if crops.mirror[position]:
                expected = v2.hflip(expected)
            difference = levels(dataset, batch.images[position : position + 1])[0] - expected.permute(1, 2, 0).numpy()
            assert np.abs(difference).max() < 0.001, (sample, corner, shape)


def test_torch_resizes_crops_without_margin_on_a_cpu() -> None:
    cpu = DecodeSettings((0, 0, 0), (1, 1, 1))
    gpu = replace(cpu, device_id=0, gpu_decoder=GpuDecoder())
    assert choose_resizer(cpu, TrainingCrop(32)) == "torch"
    assert choose_resizer(replace(cpu, device_id=0, crops_only=True), TrainingCrop(32)) == "torch"
    assert {choose_resizer(gpu, TrainingCrop(32)), choose_resizer(cpu, EvaluationCrop(32))} == {"dali"}


def test_both_resizers_agree_inside_the_border(photographs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [next(iter(training(photographs, image_size=64)))]
    monkeypatch.setattr("data.loading.graph.choose_resizer", lambda decode, crop: "dali")
    batches.append(next(iter(training(photographs, image_size=64))))
    by_torch, by_dali = (levels(photographs, batch.images)[:, 4:-4, 4:-4] for batch in batches)
    assert 0 < np.abs(by_torch - by_dali).max() < 1.001  # both round to a level


def test_a_batch_has_the_types_and_layout_of_networks(photographs: Dataset) -> None:
    batch = next(iter(training(photographs, image_size=64)))
    assert isinstance(batch, Batch)
    assert batch.images.shape == (8, 3, 64, 64)
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.dtype == batch.samples.dtype == torch.int64
    labels = photographs.index("train").rows(batch.samples.numpy()).label
    assert batch.labels.tolist() == labels.tolist()


def test_later_batches_do_not_overwrite_earlier_ones(digits: Dataset) -> None:
    loader = training(digits, batch_size=64)
    batches = list(loader)
    copies = [batch.images.clone() for batch in batches]
    assert len(list(loader)) == len(batches) == 1438 // 64
    assert all(torch.equal(batch.images, copy) for batch, copy in zip(batches, copies, strict=True))


def test_each_epoch_has_every_image_once_in_its_own_order(digits: Dataset) -> None:
    loader = training(digits, batch_size=2)
    epochs = [torch.cat([batch.samples for batch in loader]).tolist() for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(1438))
    assert epochs[0] != epochs[1]


def test_a_restored_loader_continues_with_the_same_bits(digits: Dataset) -> None:
    complete = training(digits, batch_size=200)
    batches = [(batch.images.clone(), batch.samples) for _ in range(2) for batch in complete]
    assert len(batches) == 14
    stopped = training(digits, batch_size=200)
    for _, _ in zip(range(10), (batch for _ in range(2) for batch in stopped), strict=False):
        pass
    assert stopped.state_dict() == {"epoch": 1, "step": 3}
    restored = training(digits, batch_size=200)
    restored.load_state_dict({"epoch": 1, "step": 3})
    rest = list(restored)
    assert len(rest) == 4
    for batch, (images, samples) in zip(rest, batches[10:], strict=True):
        assert torch.equal(batch.images, images)
        assert torch.equal(batch.samples, samples)
    assert restored.state_dict() == {"epoch": 2, "step": 0}


def test_an_abandoned_evaluation_starts_over(digits: Dataset) -> None:
    loader = evaluation(digits, "val", image_size=16, crop_fraction=1.0)
    next(iter(loader))
    assert torch.cat([batch.samples for batch in loader]).tolist() == list(range(359))
    assert torch.cat([batch.samples for batch in loader]).tolist() == list(range(359))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_evaluation_without_gap_or_overlap(digits: Dataset, world_size: int) -> None:
    loaders = [
        evaluation(digits, "val", image_size=16, crop_fraction=1.0, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert len({len(loader) for loader in loaders}) == 1
    samples = [sample for loader in loaders for batch in loader for sample in batch.samples.tolist()]
    assert sorted(samples) == list(range(359))


@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_as_many_batches_are_decoded_at_once_as_configured(photographs: Dataset, prefetch: int) -> None:
    loader = training(photographs, batch_size=4)
    loader.decode = replace(loader.decode, prefetch=prefetch)
    next(iter(loader))
    assert len(loader._decoding) == prefetch - 1, "the first one is in use"


def test_as_many_threads_read_as_configured(photographs: Dataset) -> None:
    threads = 7  # more than the default
    together = threading.Barrier(threads)

    class Patient(LocalShards):
        """Storage whose first reads return only when all threads are reading."""

        def read_batch(self, requests: Sequence[Request]) -> None:
            if not together.broken and together.n_waiting + len(passed) < threads:
                together.wait(timeout=30)
                passed.append(requests[0].offset)
            super().read_batch(requests)

    passed: list[int] = []
    index = photographs.index("train")
    decode = DecodeSettings(photographs.mean, photographs.std, io_threads=threads, readahead=threads)
    plan = TrainingPlan(index.shard_samples, seed=0, shuffle_window=1_000_000, batch_size=1)
    crop = TrainingCrop(32)
    next(iter(TrainingLoader(index, Patient(photographs.root), plan=plan, augment=Augmentation(crop), decode=decode)))
    assert len(passed) == threads


def test_a_tar_that_shrinks_is_named(tmp_path: Path, digits: Dataset) -> None:
    shutil.copytree(digits.root, tmp_path / "digits")
    dataset, _ = open_dataset(tmp_path / "digits")
    loader = training(dataset, batch_size=4)
    with (tmp_path / "digits" / "train-000000.tar").open("r+b") as shard:
        shard.truncate(100_000)
    with pytest.raises(ValueError, match=r"train-000000.tar ends before byte .* it changed after it was indexed"):
        list(loader)
