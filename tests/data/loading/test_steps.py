"""The steps of the graph on a CPU: resizing and operations on several threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as v2

from data.augment.apply import apply_singly
from data.augment.policies import TrivialAugment
from data.loading import steps
from data.loading.steps import PolicyOperations, TorchResize


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("large", [False, True])
def test_threads_resize_every_image_as_torchvision_does(threads: int, large: bool) -> None:
    generator, largest = np.random.default_rng(0), 900 if large else 60
    sizes = [*generator.integers(9, largest, (9, 2)).tolist(), (24, 32), (24, 48)]
    images = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    resize = TorchResize(16, (24, 32), threads=threads)
    for shown in (images, images[::-1]):  # the memory is that of the first
        for image, resized in zip(shown, resize(shown), strict=True):
            expected = v2.resize(torch.from_numpy(image).permute(2, 0, 1), [24, 32], antialias=True)
            assert np.array_equal(resized, expected.permute(1, 2, 0).numpy())


def test_images_of_the_right_size_are_left_alone() -> None:
    images = [np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8) for number in range(3)]
    left = TorchResize(4, (24, 24), threads=2)(images)
    assert all(one is other for one, other in zip(images, left, strict=True))
    expected = [v2.resize(torch.from_numpy(image).permute(2, 0, 1), [24, 24], antialias=True) for image in images]
    assert all(np.array_equal(one, other.permute(1, 2, 0)) for one, other in zip(images, expected, strict=True))


def test_threads_change_every_image_as_one_thread_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "PART", 4000)  # bytes: two images a thread
    images = list(np.random.default_rng(0).integers(0, 256, (40, 24, 32, 3), dtype=np.uint8))
    drawn = TrivialAugment().draw(np.arange(40), size=(24, 32), seed=0, epoch=0)
    mirror = np.arange(40) // 2 % 2
    expected = np.stack([image[:, ::-1] if one else image for image, one in zip(images, mirror, strict=True)])
    apply_singly(expected, drawn, fill=(0, 0, 0))
    changed = PolicyOperations(64, (24, 32), fill=(0, 0, 0), threads=4)(
        images, list(mirror), list(drawn.codes), list(drawn.magnitudes)
    )
    assert np.array_equal(np.stack(changed), expected)
    assert len({*drawn.codes[:, 0].tolist()}) > 8
