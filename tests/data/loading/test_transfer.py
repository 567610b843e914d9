"""Uint8 crops that are normalised on a device, against batches that the graph normalises."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from data.augment.augmentation import Augmentation
from data.augment.crops import CropPolicy, EvaluationCrop, TrainingCrop
from data.loading.decoder import DecodeSettings
from data.loading.loader import Loader
from data.loading.order import EvaluationPlan
from data.loading.transfer import Transfer
from data.shards.dataset import Dataset
from data.storage.local import LocalShards


@pytest.mark.parametrize("crop", [TrainingCrop(48), EvaluationCrop(48)], ids=["training", "evaluation"])
def test_uploaded_crops_become_the_floats_of_the_graph(photographs: Dataset, crop: CropPolicy) -> None:
    index, decode = photographs.index("train"), DecodeSettings(photographs.mean, photographs.std)
    plan = EvaluationPlan(len(index), 7)
    batches = [
        list(Loader(index, LocalShards(photographs.root), plan=plan, augment=Augmentation(crop), decode=settings))
        for settings in (decode, replace(decode, crops_only=True))
    ]
    assert len(batches[0]) == len(batches[1]) == plan.num_steps > 2
    for by_graph, by_device in zip(*batches, strict=True):
        assert torch.equal(by_graph.images, by_device.images)
        assert torch.equal(by_graph.samples, by_device.samples)
        assert by_device.images.dtype == torch.float32
        assert by_device.images.is_contiguous(memory_format=torch.channels_last)
    assert len({tuple(batch.images.shape) for batch in batches[1]}) == 2, "the last batches are smaller"


def test_crops_are_bytes_until_they_are_on_the_device(photographs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived: list[torch.Tensor] = []

    def remember(self: object, crops: torch.Tensor, drawn: object) -> torch.Tensor:
        arrived.append(crops)
        return crops.permute(0, 3, 1, 2).float()

    monkeypatch.setattr("data.loading.transfer.Transfer.__call__", remember)
    index = photographs.index("train")
    decode = DecodeSettings(photographs.mean, photographs.std, crops_only=True)
    plan, storage = EvaluationPlan(len(index), 7), LocalShards(photographs.root)
    assert next(iter(Loader(index, storage, plan=plan, augment=Augmentation(TrainingCrop(48)), decode=decode)))
    assert [(one.dtype, one.shape[1:]) for one in arrived] == [(torch.uint8, (48, 48, 3))]


class FakeEvent:
    """A CUDA event whose work is done when the test says so."""

    made: ClassVar[list[FakeEvent]] = []

    def __init__(self) -> None:
        self.is_done, self.was_waited_for = False, False
        self.made.append(self)

    def record(self, stream: object) -> None: ...

    def query(self) -> bool:
        return self.is_done

    def synchronize(self) -> None:
        self.was_waited_for = not self.is_done


def test_crops_of_a_gpu_are_held_until_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEvent, "made", [])
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    transfer = Transfer(torch.device("cpu"), mean=(0.0,) * 3, std=(1.0,) * 3)
    crops = [torch.zeros(1) for _ in range(6)]
    alive = [weakref.ref(one) for one in crops]
    for _ in range(3):
        transfer._hold(crops.pop(0))
    assert [one() is not None for one in alive[:3]] == [True] * 3
    FakeEvent.made[0].is_done = FakeEvent.made[1].is_done = True
    transfer._hold(crops.pop(0))
    assert [one() is not None for one in alive[:4]] == [False, False, True, True]
    transfer._hold(crops.pop(0))
    assert not any(event.was_waited_for for event in FakeEvent.made)
    transfer._hold(crops.pop(0))  # more than three: the host waits for the oldest
    assert [event.was_waited_for for event in FakeEvent.made] == [False, False, True, False, False, False]
