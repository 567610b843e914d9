"""Random erasing against torchvision's rectangles, and its noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms.v2 import RandomErasing as Reference

from data.augment.erasing import RandomErasing

COUNT, SIZE = 3000, (48, 64)


def test_rectangles_are_torchvisions() -> None:
    erasing, reference = RandomErasing(probability=1.0), Reference(p=1.0, value=0)
    boxes = erasing.draw(np.arange(COUNT), size=SIZE, seed=0, epoch=0)
    torch.manual_seed(0)
    image, expected = torch.zeros(3, *SIZE), []
    for _ in range(COUNT):
        found = reference.make_params([image])
        expected.append([found[name] for name in ("i", "j", "h", "w")])
    assert bool((boxes[:, 2:] > 0).all())
    assert bool((boxes[:, :2] + boxes[:, 2:] <= SIZE).all())
    for ours, theirs in zip(boxes.T, np.array(expected).T, strict=True):
        assert stats.ks_2samp(ours, theirs).pvalue > 1e-4


def test_the_probability_is_that_of_an_image() -> None:
    boxes = RandomErasing(probability=0.25).draw(np.arange(COUNT), size=SIZE, seed=0, epoch=0)
    assert stats.binomtest(int((boxes[:, 2] > 0).sum()), COUNT, 0.25).pvalue > 1e-4
    assert not RandomErasing(probability=0.0).draw(np.arange(COUNT), size=SIZE, seed=0, epoch=0).any()


def test_nothing_is_erased_where_no_rectangle_fits() -> None:
    erasing = RandomErasing(probability=1.0, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert not erasing.draw(np.arange(10), size=SIZE, seed=0, epoch=0).any()


@pytest.mark.parametrize("fill", ["pixel", "constant"])
def test_only_the_rectangle_changes(fill: str) -> None:
    erasing, samples = RandomErasing(probability=0.8, fill=fill), np.arange(40) + 7
    boxes = erasing.draw(samples, size=SIZE, seed=1, epoch=2)
    before = torch.full((40, 3, *SIZE), 9.0).to(memory_format=torch.channels_last)
    images = before.clone()
    erasing.erase(images, boxes, samples=samples, seed=1, epoch=2)
    is_inside = torch.zeros(40, 1, *SIZE, dtype=torch.bool)
    for mask, (top, left, height, width) in zip(is_inside, boxes.tolist(), strict=True):
        mask[:, top : top + height, left : left + width] = True
    is_inside = is_inside.expand_as(images)
    assert 0.05 < float(is_inside.float().mean()) < 0.3
    assert torch.equal(images[~is_inside], before[~is_inside])
    inside = images[is_inside]
    if fill == "constant":
        assert not inside.any()
    else:
        assert stats.kstest(inside.numpy()[:5000], stats.norm.cdf).pvalue > 1e-4
        assert len(inside.unique()) > 0.9 * len(inside)
    again = before[5:8].clone()  # as another rank would have them
    erasing.erase(again, boxes[5:8], samples=samples[5:8], seed=1, epoch=2)
    assert torch.equal(again, images[5:8])
    erasing.erase(again, boxes[5:8], samples=samples[5:8], seed=1, epoch=3)
    assert torch.equal(again, images[5:8]) == (fill == "constant")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"probability": 1.5}, "probability=1.5 must be a probability: 0 to 1"),
        ({"fill": "noise"}, "fill=noise is not one of pixel, constant"),
        ({"scale": (0.5,)}, r"scale=\[0.5\] must be a range of two numbers"),
        ({"scale": (0.5, 0.2)}, r"scale=\[0.5, 0.2\] must rise from above 0 to at most 1"),
        ({"ratio": (0.0, 1.0)}, r"ratio=\[0.0, 1.0\] must rise from above 0"),
    ],
)
def test_impossible_values_are_one_sentence(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomErasing(**wrong)
