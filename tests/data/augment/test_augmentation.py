"""Augmented batches: the same images on any number of ranks, after a resume, and on both ways through the graph."""

from __future__ import annotations

import hashlib

import pytest
import torch

from data.augment.augmentation import Augmentation
from data.augment.crops import TrainingCrop
from data.augment.erasing import RandomErasing
from data.augment.policies import ColorJitter, Policy, RandAugment, TrivialAugment
from data.loading.decoder import DecodeSettings
from data.loading.loader import Batch, TrainingLoader
from data.loading.order import TrainingPlan
from data.shards.dataset import Dataset
from data.storage.local import LocalShards

GLOBAL_BATCH, ERASING = 8, RandomErasing(0.5)
POLICIES = [TrivialAugment(), RandAugment(), ColorJitter(0.4, 0.4, 0.4, 0.1, grey=0.2, blur=0.3)]


def loader(
    dataset: Dataset, policy: Policy | None, *, world_size: int = 1, rank: int = 0, crops_only: bool = False,
    erasing: RandomErasing | None = ERASING,
) -> TrainingLoader:  # fmt: skip
    index = dataset.index("train")
    decode = DecodeSettings(dataset.mean, dataset.std, crops_only=crops_only)
    plan = TrainingPlan(
        index.shard_samples, seed=0, shuffle_window=1_000_000, batch_size=GLOBAL_BATCH // world_size, rank=rank,
        world_size=world_size,
    )  # fmt: skip
    augment = Augmentation(TrainingCrop(40), policy, erasing)
    return TrainingLoader(index, LocalShards(dataset.root), plan=plan, augment=augment, decode=decode, seed=5)


def epoch(batches: TrainingLoader) -> list[Batch]:
    """One epoch, copied: DALI reuses its memory."""
    return [Batch(*(part.clone() for part in batch)) for batch in batches]


def hashes(batches: list[Batch]) -> dict[int, str]:
    """The SHA-256 of each image by its sample."""
    return {
        int(sample): hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()
        for batch in batches
        for image, sample in zip(batch.images, batch.samples, strict=True)
    }


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_any_number_of_ranks_has_the_same_images(photographs: Dataset, policy: Policy) -> None:
    alone = hashes(epoch(loader(photographs, policy)))
    assert len(alone) >= 2 * GLOBAL_BATCH
    for world_size in (2, 4):
        shared: dict[int, str] = {}
        for rank in range(world_size):
            shared |= hashes(epoch(loader(photographs, policy, world_size=world_size, rank=rank)))
        assert shared == alone
    assert hashes(epoch(loader(photographs, None, erasing=None))) != alone


def test_a_resumed_loader_has_the_same_images(photographs: Dataset) -> None:
    uninterrupted = loader(photographs, RandAugment())
    first, second = epoch(uninterrupted), epoch(uninterrupted)
    assert hashes(first) != hashes(second)
    resumed = loader(photographs, RandAugment())
    resumed.load_state_dict({"epoch": 1, "step": 1})
    assert hashes(epoch(resumed)) == hashes(second[1:])


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_crops_are_augmented_alike_in_the_graph_and_on_the_device(photographs: Dataset, policy: Policy) -> None:
    in_graph, on_device = epoch(loader(photographs, policy)), epoch(loader(photographs, policy, crops_only=True))
    assert len(in_graph) == len(on_device) >= 2
    for one, other in zip(in_graph, on_device, strict=True):
        assert torch.equal(one.images, other.images)


def test_operations_follow_the_mirror_and_precede_the_normalisation(photographs: Dataset) -> None:
    augmented = loader(photographs, RandAugment(), erasing=None)
    plain = loader(photographs, None, erasing=None, crops_only=True)
    std = torch.tensor(photographs.std).view(3, 1, 1) * 255
    mean = torch.tensor(photographs.mean).view(3, 1, 1) * 255
    changed = 0
    for one, other in zip(epoch(augmented), epoch(plain), strict=True):
        levels = (other.images * std + mean).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        drawn = augmented.augment.draw(torch.full((len(levels), 2), 40).numpy(), one.samples.numpy(), seed=5, epoch=0)
        before = levels.clone()
        drawn.apply_operations(levels)
        changed += int((levels != before).any())
        assert torch.allclose(one.images, (levels.permute(0, 3, 1, 2) - mean) / std, atol=1e-4)
    assert changed >= 2
