"""Batches against PIL's decoder and torchvision's resize, and errors for files that changed."""

from __future__ import annotations

import io
import itertools
import re
import shutil
import tarfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision.transforms import functional as reference
from torchvision.transforms.v2 import functional as v2

from data.loading import loader as loader_module
from data.loading.crops import EvaluationCrop, TrainingCrop
from data.loading.decoder import DecodeSettings, GpuDecoder
from data.loading.graph import choose_resizer
from data.loading.loader import Batch, EncodedBatch, Loader, TrainingLoader
from data.loading.order import EvaluationPlan, Position, TrainingPlan
from data.loading.storage import LocalShards
from data.shards import sources
from data.shards.dataset import Dataset, Rows
from data.shards.images import UnreadableImage
from data.shards.indexing import open_dataset
from data.shards.pack import pack
from tests.support.images import make_folder, make_jpeg
from tests.support.paths import CIFAR


def evaluation(
    dataset: Dataset, split: str, *, image_size: int, crop_fraction: float, batch_size: int = 16, **ranks: int
) -> Loader:
    index, decode = dataset.index(split), DecodeSettings(dataset.mean, dataset.std)
    plan, crop = EvaluationPlan(len(index), batch_size, **ranks), EvaluationCrop(image_size, crop_fraction)
    return Loader(index, LocalShards(dataset.root), plan=plan, crop=crop, decode=decode)


def training(dataset: Dataset, *, image_size: int = 32, batch_size: int = 8, **plan: int) -> TrainingLoader:
    index, decode = dataset.index("train"), DecodeSettings(dataset.mean, dataset.std)
    order = TrainingPlan(index.shard_samples, seed=0, shuffle_window=1_000_000, batch_size=batch_size, **plan)
    return TrainingLoader(index, LocalShards(dataset.root), plan=order, crop=TrainingCrop(image_size), decode=decode)


def decode_by_pil(dataset: Dataset, split: str, sample: int) -> Image.Image:
    """Read a sample with Python's tarfile and PIL: upright, RGB."""
    tar, _, key = dataset.index(split).keys([sample])[0].partition(": ")
    with tarfile.open(dataset.root / tar) as shard:
        member = next(m for m in shard if m.name.startswith(key + ".") and not m.name.endswith(".cls"))
        content = shard.extractfile(member)
        assert content is not None
        return ImageOps.exif_transpose(Image.open(io.BytesIO(content.read()))).convert("RGB")


def levels(dataset: Dataset, images: torch.Tensor) -> np.ndarray:
    """Undo the normalisation: (N, 3, H, W) -> (N, H, W, 3) in levels of 0 to 255."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (dataset.mean, dataset.std))
    return ((images * std + mean) * 255).permute(0, 2, 3, 1).numpy()


def first_and_last(dataset: Dataset, split: str) -> list[int]:
    """List the first and the last sample of every class."""
    index = dataset.index(split)
    labels = index.rows(np.arange(len(index))).label
    pairs = [np.flatnonzero(labels == label)[[0, -1]] for label in range(len(dataset.classes))]
    return sorted({int(sample) for pair in pairs for sample in pair})


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
        crops = loader.crop.crops(sizes, batch.samples.numpy(), seed=0, epoch=0)
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
    monkeypatch.setattr("data.loading.loader.choose_resizer", lambda decode, crop: "dali")
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


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    source = sources.folder(make_folder(tmp_path / "images"), "three", val_fraction=0.0, seed=0)
    dataset = pack(source, tmp_path / "packed").dataset
    index = dataset.index("train")
    rows = index.rows(np.array([5]))
    tar = dataset.root / "train-000000.tar"
    with tar.open("r+b") as shard:
        shard.seek(int(rows.offset[0]) + 2)
        shard.write(bytes(int(rows.size[0]) - 2))
    name = index.keys([5])[0]
    with pytest.raises(UnreadableImage, match=name):
        list(training(dataset, batch_size=4))


def shorten(rows: Rows, which: NDArray[np.bool_]) -> Rows:
    """The rows of an index whose tar has only half of some images."""
    return rows._replace(size=np.where(which, rows.size // 2, rows.size))


@pytest.mark.parametrize("is_cut", [True, False])
def test_a_jpeg_that_a_gpu_would_complete_with_grey_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cut: bool
) -> None:
    images = make_folder(tmp_path / "images")
    path = next(images.rglob("*.jpg"))
    path.write_bytes(path.read_bytes() + bytes(100))  # complete, although it does not end with its end marker
    dataset = pack(sources.folder(images, "three", val_fraction=0.0, seed=0), tmp_path / "packed").dataset
    monkeypatch.setattr("data.loading.loader.build_pipeline", lambda source, **_: FailingPipeline("on the GPU", source))
    loader = training(dataset, batch_size=len(dataset.index("train")))
    loader.decode = replace(loader.decode, gpu_decoder=GpuDecoder())
    if is_cut:
        rows = loader.index.rows
        monkeypatch.setattr(loader.index, "rows", lambda samples: shorten(rows(samples), samples == 5))
    name = f"cannot be decoded: {loader.index.keys([5])[0]} (it ends early)"
    with pytest.raises(UnreadableImage if is_cut else RuntimeError, match=re.escape(name) if is_cut else "on the GPU"):
        next(iter(loader))


class FailingPipeline:
    """DALI's pipeline, failing with a message once it has taken two batches."""

    def __init__(self, message: str, source: Callable[[], object]) -> None:
        self.message, self.source = message, source

    def run(self) -> object:
        self.source(), self.source()
        raise RuntimeError(f"Critical error in pipeline:\nencountered:\n\n{self.message}")


def failing(dataset: Dataset, message: str, monkeypatch: pytest.MonkeyPatch) -> TrainingLoader:
    monkeypatch.setattr("data.loading.loader.build_pipeline", lambda source, **_: FailingPipeline(message, source))
    return training(dataset, batch_size=4)


def test_the_last_image_of_the_larger_of_two_batches_is_named(tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images")
    dataset = pack(sources.folder(images, "three", val_fraction=0.0, seed=0), tmp_path / "packed").dataset
    index = dataset.index("train")
    count = len(index) if len(index) % 2 else len(index) - 1
    plan = EvaluationPlan(count, (count + 1) // 2)
    assert [len(plan.samples(0, step)) for step in range(2)] == [count // 2, count // 2 + 1]
    decode = DecodeSettings(dataset.mean, dataset.std)
    loader = Loader(index, LocalShards(dataset.root), plan=plan, crop=EvaluationCrop(32), decode=decode)
    last = plan.samples(0, 1)[-1:]
    rows = index.rows(last)
    with (dataset.root / index.split.shards[int(rows.shard[0])].file).open("r+b") as shard:
        shard.seek(int(rows.offset[0]) + 2)
        shard.write(bytes(int(rows.size[0]) - 2))
    with pytest.raises(UnreadableImage, match=re.escape(index.keys(last)[0])):
        list(loader)


def test_a_number_in_dalis_message_names_the_image(photographs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = failing(photographs, "Failed to decode sample #2 : ", monkeypatch)
    sample = loader.plan.samples(0, 0)[2:3]  # the oldest batch in flight
    with pytest.raises(UnreadableImage, match=re.escape(loader.index.keys(sample)[0])) as caught:
        next(iter(loader))
    assert "the CPU decodes it: data.decoder=cpu name=NAME, a new run" in str(caught.value)


def test_an_image_without_memory_to_decode_it_is_not_blamed(
    photographs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = failing(photographs, "Failed to decode sample #2 : ", monkeypatch)
    loader.decode = replace(loader.decode, device_id=0, gpu_decoder=GpuDecoder())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 * 2**20, 2**36))
    with pytest.raises(torch.OutOfMemoryError):
        next(iter(loader))


def test_an_image_that_is_smaller_than_indexed_is_named(
    photographs: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = training(photographs, batch_size=4)
    sample = int(loader.plan.samples(0, 1)[3])
    read = loader._read

    def with_a_small_image(position: Position) -> EncodedBatch:
        batch = read(position)
        small = np.frombuffer(make_jpeg(8, 8), np.uint8)
        return batch._replace(images=[*batch.images[:3], small]) if position.step == 1 else batch

    monkeypatch.setattr(loader, "_read", with_a_small_image)
    with pytest.raises(UnreadableImage, match=re.escape(loader.index.keys([sample])[0])):
        list(loader)


@pytest.mark.parametrize("message", ["CUDA error: an illegal memory access", "nvImageCodec failure: '#8'"])
def test_an_error_that_no_image_explains_stays_as_it_is(
    photographs: Dataset, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    checked: list[object] = []
    decode = loader_module.can_decode
    monkeypatch.setattr(loader_module, "can_decode", lambda *one, **reach: checked.append(0) or decode(*one, **reach))
    with pytest.raises(RuntimeError, match=re.escape(message)) as caught:
        next(iter(failing(photographs, message, monkeypatch)))
    assert type(caught.value) is RuntimeError
    assert len(checked) == (8 if "nvImageCodec" in message else 0), "both batches in flight, or none"


def test_memory_that_dali_lacks_is_not_blamed_on_images(photographs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="CUDA allocation failed"):
        next(iter(failing(photographs, "CUDA allocation failed\nfor 1234 bytes", monkeypatch)))


def test_a_graph_without_memory_to_be_built_is_out_of_memory(
    photographs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(source: object, **settings: object) -> None:
        raise RuntimeError("Can't allocate 1234 bytes on device 0.")

    monkeypatch.setattr("data.loading.loader.build_pipeline", build)
    with pytest.raises(torch.OutOfMemoryError, match="Can't allocate 1234 bytes"):
        next(iter(training(photographs)))


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

        def read(self, file: str, into: np.ndarray, *, offset: int) -> None:
            if not together.broken and together.n_waiting + len(passed) < threads:
                together.wait(timeout=30)
                passed.append(offset)
            super().read(file, into, offset=offset)

    passed: list[int] = []
    index = photographs.index("train")
    decode = DecodeSettings(photographs.mean, photographs.std, io_threads=threads, readahead=threads)
    plan = TrainingPlan(index.shard_samples, seed=0, shuffle_window=1_000_000, batch_size=1)
    crop = TrainingCrop(32)
    next(iter(TrainingLoader(index, Patient(photographs.root), plan=plan, crop=crop, decode=decode)))
    assert len(passed) == threads


def test_a_tar_that_shrinks_is_named(tmp_path: Path, digits: Dataset) -> None:
    shutil.copytree(digits.root, tmp_path / "digits")
    dataset, _ = open_dataset(tmp_path / "digits")
    loader = training(dataset, batch_size=4)
    with (tmp_path / "digits" / "train-000000.tar").open("r+b") as shard:
        shard.truncate(100_000)
    with pytest.raises(ValueError, match=r"train-000000.tar ends before byte .* it changed after it was indexed"):
        list(loader)
