"""Uint8 crops that are normalised on a device, against batches that the graph normalises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from data.loading.crops import CropPolicy, EvaluationCrop, TrainingCrop
from data.loading.decoder import DecodeSettings
from data.loading.loader import Loader
from data.loading.order import EvaluationPlan
from data.loading.storage import LocalShards
from data.shards.dataset import Dataset


@pytest.mark.parametrize("crop", [TrainingCrop(48), EvaluationCrop(48)], ids=["training", "evaluation"])
def test_uploaded_crops_become_the_floats_of_the_graph(photographs: Dataset, crop: CropPolicy) -> None:
    index, decode = photographs.index("train"), DecodeSettings(photographs.mean, photographs.std)
    plan = EvaluationPlan(len(index), 7)
    batches = [
        list(Loader(index, LocalShards(photographs.root), plan=plan, crop=crop, decode=settings))
        for settings in (decode, replace(decode, uploads=True))
    ]
    assert len(batches[0]) == len(batches[1]) == plan.num_steps > 2
    for by_graph, by_device in zip(*batches, strict=True):
        assert torch.equal(by_graph.images, by_device.images)
        assert torch.equal(by_graph.samples, by_device.samples)
        assert by_device.images.dtype == torch.float32
        assert by_device.images.is_contiguous(memory_format=torch.channels_last)
    assert len({tuple(batch.images.shape) for batch in batches[1]}) == 2, "the last batches are smaller"


def test_uploads_are_bytes_until_they_are_on_the_device(photographs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived: list[torch.Tensor] = []

    def remember(self: object, crops: torch.Tensor) -> torch.Tensor:
        arrived.append(crops)
        return crops.permute(0, 3, 1, 2).float()

    monkeypatch.setattr("data.loading.transfer.Transfer.__call__", remember)
    index = photographs.index("train")
    decode = DecodeSettings(photographs.mean, photographs.std, uploads=True)
    plan, storage = EvaluationPlan(len(index), 7), LocalShards(photographs.root)
    assert next(iter(Loader(index, storage, plan=plan, crop=TrainingCrop(48), decode=decode)))
    assert [(one.dtype, one.shape[1:]) for one in arrived] == [(torch.uint8, (48, 48, 3))]
