"""Images that cannot be decoded are named, and nothing else is blamed on images."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from data.augment.augmentation import Augmentation
from data.augment.crops import EvaluationCrop
from data.loading import loader as loader_module
from data.loading.decoder import DecodeSettings, GpuDecoder
from data.loading.loader import EncodedBatch, Loader, TrainingLoader
from data.loading.order import EvaluationPlan, Position
from data.shards import sources
from data.shards.dataset import Dataset, Rows
from data.shards.images import UnreadableImage
from data.shards.pack import pack
from data.storage.local import LocalShards
from tests.support.images import make_folder, make_jpeg
from tests.support.loaders import training


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


def test_an_end_counts_only_behind_the_last_scan() -> None:
    thumbnail, image = make_jpeg(8, 8), make_jpeg(40, 50, progressive=True)
    segment = b"Exif\0\0" + thumbnail + bytes(40)
    encoded = image[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + image[2:]
    scan = encoded.rindex(b"\xff\xda")
    cuts = [encoded[:end] for end in range(scan + 2, len(encoded) - 1)]
    assert len(cuts) > 50
    assert all(loader_module._is_unfinished(np.frombuffer(one, np.uint8)) for one in cuts)
    for complete in (encoded, encoded + bytes(5000), encoded + make_jpeg(8, 8), b"\x89PNG" + encoded[: scan + 9]):
        assert not loader_module._is_unfinished(np.frombuffer(complete, np.uint8))


def test_a_number_beyond_the_oldest_batch_hides_no_message(
    photographs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="Failed to decode sample #7"):
        next(iter(failing(photographs, "Failed to decode sample #7 : ", monkeypatch)))


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
    loader = Loader(
        index, LocalShards(dataset.root), plan=plan, augment=Augmentation(EvaluationCrop(32)), decode=decode
    )
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


def test_memory_that_the_arithmetic_lacks_is_out_of_memory(
    photographs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(crops: torch.Tensor, drawn: object) -> torch.Tensor:
        raise torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later")

    loader = training(photographs)
    monkeypatch.setattr(loader, "_transfer", fails)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA error: out of memory"):
        next(iter(loader))


def test_a_graph_without_memory_to_be_built_is_out_of_memory(
    photographs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(source: object, **settings: object) -> None:
        raise RuntimeError("Can't allocate 1234 bytes on device 0.")

    monkeypatch.setattr("data.loading.loader.build_pipeline", build)
    with pytest.raises(torch.OutOfMemoryError, match="Can't allocate 1234 bytes"):
        next(iter(training(photographs)))
