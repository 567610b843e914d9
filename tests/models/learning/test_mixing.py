"""Mixup and CutMix against timm's and torchvision's, and their draws against SciPy's distributions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import scipy.stats
import torch
from timm.data.mixup import Mixup
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2

from data.draws import NETWORK, key
from models.learning.mixing import Mixing, mix_images, mix_labels

CLASSES = 4
KEYS = [int(key(NETWORK, 0, step)) for step in range(2000)]
BOTH = Mixing(mixup_alpha=0.8, cutmix_alpha=1.0, probability=0.7, switch_probability=0.4)


def make_batch(count: int) -> tuple[Tensor, Tensor]:
    """Images of 11x7 pixels in channels_last memory, and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 11, 7, generator=generator).to(memory_format=torch.channels_last)
    return images, torch.randint(CLASSES, (count,), generator=generator)


@contextmanager
def numpy_seeded(batch_key: int) -> Iterator[None]:
    """Let NumPy's global generator, from which timm draws, be the one of a key."""
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.Philox(key=batch_key))
    try:
        yield
    finally:
        np.random.set_bit_generator(before)


@pytest.mark.parametrize("mixing", [Mixing(mixup_alpha=0.2), Mixing(cutmix_alpha=1.0), BOTH], ids=str)
def test_a_batch_is_mixed_as_by_timm(mixing: Mixing) -> None:
    """timm mixes an image with the one at the mirrored place: with its partner, in batches of two."""
    theirs = Mixup(
        mixing.mixup_alpha, mixing.cutmix_alpha, prob=mixing.probability, switch_prob=mixing.switch_probability,
        label_smoothing=0.0, num_classes=CLASSES,
    )  # fmt: skip
    images, labels = make_batch(5)
    for batch_key in KEYS[:60]:
        mixed, targets = mixing.mix_batch(images, labels, num_classes=CLASSES, key=batch_key)
        targets = functional.one_hot(targets, CLASSES) if targets.ndim == 1 else targets
        for place in range(5):
            pair = [place, place - 1]
            with numpy_seeded(batch_key):
                expected, probabilities = theirs(images[pair].clone(), labels[pair])
            torch.testing.assert_close(mixed[place], expected[0], rtol=0, atol=1e-6)
            torch.testing.assert_close(targets[place].float(), probabilities[0], rtol=0, atol=1e-6)


def test_some_batches_are_left_and_the_others_switch() -> None:
    kinds = Counter(
        mix and ("box" if mix.box else "blend") for mix in (BOTH.draw(one, height=9, width=9) for one in KEYS)
    )
    assert kinds[None] / 2000 == pytest.approx(0.3, abs=0.03)
    assert kinds["box"] / 2000 == pytest.approx(0.7 * 0.4, abs=0.03)
    assert kinds["blend"] / 2000 == pytest.approx(0.7 * 0.6, abs=0.03)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_ratios_follow_the_beta_distribution(alpha: float) -> None:
    ratios = [Mixing(mixup_alpha=alpha).draw(one, height=1, width=1).lam for one in KEYS]
    assert scipy.stats.kstest(ratios, scipy.stats.beta(alpha, alpha).cdf).pvalue > 0.05
    assert scipy.stats.kstest(ratios, scipy.stats.beta(1.5 * alpha, 1.5 * alpha).cdf).pvalue < 1e-4


def test_the_ratio_of_a_box_is_the_area_that_it_leaves() -> None:
    images = torch.stack([torch.zeros(1, 11, 7), torch.ones(1, 11, 7)])
    areas = set()
    for batch_key in KEYS[:200]:
        mix = Mixing(cutmix_alpha=1.0).draw(batch_key, height=11, width=7)
        filled = mix_images(images, mix)[0].double().mean().item()
        assert mix.lam == pytest.approx(1 - filled, abs=1e-12)
        areas.add(filled)
    assert len(areas) > 20


def test_images_and_labels_are_mixed_as_by_torchvision() -> None:
    images, labels = make_batch(6)
    blend, cut = (
        Mixing(mixup_alpha=1.0).draw(1, height=11, width=7),
        Mixing(cutmix_alpha=1.0).draw(3, height=11, width=7),
    )
    rows, columns = cut.box
    box = (columns.start, rows.start, columns.stop, rows.stop)
    assert (rows.stop - rows.start) * (columns.stop - columns.start) > 4
    for mix, theirs, drawn in (
        (blend, v2.MixUp(num_classes=CLASSES), {"lam": blend.lam}),
        (cut, v2.CutMix(num_classes=CLASSES), {"box": box, "lam_adjusted": cut.lam}),
    ):
        theirs.make_params = lambda _, drawn=drawn: drawn
        expected, probabilities = theirs(images, labels)
        torch.testing.assert_close(mix_images(images, mix), expected, rtol=0, atol=1e-6)
        found = mix_labels(labels, mix, num_classes=CLASSES)
        torch.testing.assert_close(found, probabilities, rtol=0, atol=1e-6)


def test_a_key_decides_all_and_the_batch_stays() -> None:
    images, labels = make_batch(8)
    before = images.clone()
    first = Mixing(mixup_alpha=1.0, cutmix_alpha=1.0)
    mixed = {one: first.mix_batch(images, labels, num_classes=CLASSES, key=one)[0] for one in KEYS[:30]}
    np.random.seed(7)
    torch.manual_seed(7)
    for one, expected in mixed.items():
        again, _ = first.mix_batch(images, labels, num_classes=CLASSES, key=one)
        assert torch.equal(again, expected)
        assert again.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)
    assert len({tuple(one.flatten().tolist()) for one in mixed.values()}) >= 28  # a box may be empty


@pytest.mark.parametrize(
    ("off_epoch", "mixed"), [(None, 10), (1, 1), (8, 8), (10, 10), (20, 10), (-1, 9), (-8, 2), (-10, 0), (-20, 0)]
)
def test_the_first_epochs_are_mixed(off_epoch: int | None, mixed: int) -> None:
    assert Mixing(mixup_alpha=1.0, off_epoch=off_epoch).count_epochs(10) == mixed


def test_mixing_is_described_in_one_line() -> None:
    assert Mixing(cutmix_alpha=1.0).describe(9) == "CutMix (alpha 1); train/top1 weighs the two labels of an image"
    changed = Mixing(mixup_alpha=0.2, cutmix_alpha=1.0, probability=0.8, off_epoch=-2)
    kinds = "mixup (alpha 0.2) or, with a probability of 0.5, CutMix (alpha 1)"
    assert changed.describe(9).startswith(f"{kinds} of 0.8 of the batches in the first 7 of 9 epochs; train/top1 ")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "^cutmix_alpha=0.0 is off, and so is mixup_alpha: one of them must be above 0$"),
        ({"mixup_alpha": -0.1}, "^mixup_alpha=-0.1 must be a number of at least 0, which is off$"),
        ({"cutmix_alpha": math.nan}, "^cutmix_alpha=nan must be a number of at least 0"),
        ({"cutmix_alpha": math.inf}, "^cutmix_alpha=inf must be a number of at least 0"),
        ({"cutmix_alpha": True}, "^cutmix_alpha=True must be a number of at least 0"),
        ({"probability": 1.1}, "^probability=1.1 must be a number from 0 to 1$"),
        ({"switch_probability": -0.1}, "^switch_probability=-0.1 must be a number from 0 to 1$"),
        (
            {"off_epoch": 0},
            "^off_epoch=0 must be a number of epochs: 20 mixes the first 20, -20 all but the last 20, nul",
        ),
        ({"off_epoch": 0.9}, "^off_epoch=0.9 must be a number of epochs"),
    ],
)
def test_impossible_mixing_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixing(**({"mixup_alpha": 0.2} | wrong if wrong else {}))
