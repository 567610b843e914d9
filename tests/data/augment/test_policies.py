"""Policies against torchvision's and timm's: the same operations, magnitudes and frequencies."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image
from scipy import stats
from torchvision.transforms import v2

from data.augment.apply import CODES, NAMES, Operations
from data.augment.policies import AutoAugment, ColorJitter, Policy, RandAugment, TimmRandAugment, TrivialAugment
from pipeline.cli.compose import compose

COUNT, SIZE = 4000, (48, 64)
# torchvision's names, and what its magnitudes become here.
TORCHVISION = {
    **{name: name.lower() for name in ("Identity", "Brightness", "Contrast", "Sharpness", "Posterize", "Solarize")},
    **{"Rotate": "rotate", "Color": "saturation", "AutoContrast": "autocontrast", "Equalize": "equalize"},
    **{"ShearX": "shear_x", "ShearY": "shear_y", "TranslateX": "translate_x", "TranslateY": "translate_y"},
    "Invert": "invert",
}
ENHANCED = ("brightness", "saturation", "contrast", "sharpness")
TIMM = {
    **{"auto_contrast": "autocontrast", "color": "saturation"},
    **{"translate_x_rel": "translate_x", "translate_y_rel": "translate_y"},
}


def named(operation: str, magnitude: float) -> tuple[str, float]:
    digits = 0 if operation == "posterize" else 3  # only the bits that are kept matter
    return operation, round(magnitude, digits) + 0.0


def counted(drawn: Operations) -> Counter[tuple[tuple[str, float], ...]]:
    """Count the operations of images, with rounded magnitudes, identities left out."""
    rows: list[tuple[tuple[str, float], ...]] = []
    for codes, magnitudes in zip(drawn.codes.tolist(), drawn.magnitudes.tolist(), strict=True):
        row = [(NAMES[code], magnitude) for code, magnitude in zip(codes, magnitudes, strict=True)]
        rows.append(tuple(named(*one) for one in row if one[0] != "identity"))
    return Counter(rows)


def torchvision_rows(transform: v2.Transform, count: int) -> Counter[tuple[tuple[str, float], ...]]:
    """Count the operations that torchvision applies to `count` images."""
    rows, row = [], []

    def record(image: object, name: str, magnitude: float, **_: object) -> object:
        ours = TORCHVISION[name]
        if ours in ENHANCED:
            magnitude += 1
        if ours == "solarize":
            magnitude *= 255
        if ours.startswith("translate"):
            magnitude = int(magnitude)
        if ours != "identity":
            row.append(named(ours, magnitude))
        return image

    image = torch.zeros(3, *SIZE, dtype=torch.uint8)
    torch.manual_seed(0)
    with mock.patch.object(transform, "_apply_image_or_video_transform", record):
        for _ in range(count):
            transform(image)
            rows.append(tuple(row))
            row.clear()
    return Counter(rows)


def check_same_distribution(ours: Counter, theirs: Counter, *, least: int = 10) -> None:
    """Refuse counts that a chi-square test tells apart, or values that only one of the two has."""
    common = [value for value in {*ours, *theirs} if ours[value] + theirs[value] >= 2 * least]
    assert len(common) > 1
    for value in common:
        assert min(ours[value], theirs[value]) > 0, value
    table = [[counts[value] for value in common] for counts in (ours, theirs)]
    assert stats.chi2_contingency(table).pvalue > 1e-4


@pytest.mark.parametrize(
    ("policy", "transform"),
    [
        (TrivialAugment(num_levels=4), v2.TrivialAugmentWide(num_magnitude_bins=4)),
        (RandAugment(num_ops=1, magnitude=7), v2.RandAugment(num_ops=1, magnitude=7)),
        (AutoAugment(), v2.AutoAugment()),
    ],
    ids=["TrivialAugment", "RandAugment", "AutoAugment"],
)
def test_a_policy_draws_what_torchvisions_draws(policy: Policy, transform: v2.Transform) -> None:
    drawn = policy.draw(np.arange(COUNT), size=SIZE, seed=0, epoch=0)
    check_same_distribution(counted(drawn), torchvision_rows(transform, COUNT))


@pytest.mark.parametrize("policy", [TrivialAugment(), RandAugment(magnitude=30), RandAugment(magnitude=0)])
def test_the_strongest_magnitudes_are_torchvisions(policy: Policy) -> None:
    drawn = policy.draw(np.arange(30_000), size=SIZE, seed=0, epoch=0)
    is_wide = isinstance(policy, TrivialAugment)
    space = (v2.TrivialAugmentWide if is_wide else v2.RandAugment)._AUGMENTATION_SPACE
    for name, (levels, signed) in space.items():
        values = levels(31, *SIZE)
        if values is None:
            continue
        ours, expected = TORCHVISION[name], np.asarray(values, float)
        if not is_wide:
            expected = expected[[policy.magnitude]]
        if ours.startswith("translate"):
            expected = np.trunc(expected.round(4))  # 15.999999 of float32 is 16 here
        expected = expected * 255 if ours == "solarize" else expected
        expected = np.unique([*expected, *(-expected if signed else [])]) + (ours in ENHANCED)
        found = np.unique(drawn.magnitudes[drawn.codes == CODES[ours]])
        found = np.unique(found.round()) if ours == "posterize" else found
        assert np.allclose(found, np.unique(expected), atol=1e-4), name


@pytest.mark.parametrize("increasing", [True, False])
def test_randaugment_of_timm_draws_what_timms_draws(increasing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.data import auto_augment

    rows, row = [], []
    for name, function in auto_augment.NAME_TO_OP.items():

        def record(image: object, *values: float, ours: str = function.__name__, **_: object) -> object:
            row.append((TIMM.get(ours, ours), values))
            return image

        monkeypatch.setitem(auto_augment.NAME_TO_OP, name, record)
    text = f"rand-m6-mstd2.5-n1{'-inc1' if increasing else ''}"
    theirs = auto_augment.rand_augment_transform(text, {"translate_pct": 0.45})
    auto_augment.random.seed(0)
    np.random.seed(0)  # timm draws from it
    for _ in range(2 * COUNT):
        theirs(Image.new("RGB", SIZE[::-1]))
        rows.append(tuple(row))
        row.clear()
    policy = TimmRandAugment(num_ops=1, magnitude=6, magnitude_std=2.5, increasing=increasing)
    drawn = policy.draw(np.arange(2 * COUNT), size=SIZE, seed=0, epoch=0)
    names = Counter(name for (name, _), *_ in filter(None, rows))
    ours = Counter(NAMES[code] for code in drawn.codes[:, 0] if NAMES[code] != "identity")
    assert {*names} == {*ours}
    assert stats.chi2_contingency([[counts[name] for name in names] for counts in (names, ours)]).pvalue > 1e-4
    assert stats.binomtest(sum(ours.values()), 2 * COUNT, 0.5).pvalue > 1e-4
    for name in names:
        expected = np.array([values[0] for (found, values), *_ in filter(None, rows) if found == name and values])
        found = drawn.magnitudes[:, 0][drawn.codes[:, 0] == CODES[name]]
        expected = expected * {"translate_x": SIZE[1], "translate_y": SIZE[0]}.get(name, 1)
        if len(expected):
            assert stats.ks_2samp(expected, found).pvalue > 1e-4, name


def test_color_jitter_draws_what_torchvisions_draws() -> None:
    ours = ColorJitter(brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1)
    theirs = v2.ColorJitter(brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1)
    drawn = ours.draw(np.arange(COUNT), size=SIZE, seed=0, epoch=0)
    torch.manual_seed(0)
    params = [theirs.make_params([]) for _ in range(COUNT)]
    names = ("brightness", "contrast", "saturation", "hue")
    orders = Counter(tuple(int(place) for place in one["fn_idx"]) for one in params)
    found = Counter(tuple(names.index(NAMES[code]) for code in codes) for codes in drawn.codes[:, :4].tolist())
    check_same_distribution(found, orders)
    for name in names:
        values = drawn.magnitudes[:, :4][drawn.codes[:, :4] == CODES[name]]
        assert stats.ks_2samp(values, [float(one[f"{name}_factor"]) for one in params]).pvalue > 1e-4
    assert not drawn.codes[:, 4:].any()


def test_grey_blur_and_solarize_have_their_probabilities() -> None:
    policy = ColorJitter(grey=0.2, blur=0.5, sigma=(0.3, 1.2), solarize=0.1)
    drawn = policy.draw(np.arange(COUNT), size=SIZE, seed=0, epoch=0)
    assert not drawn.codes[:, :4].any()
    for place, (name, probability) in enumerate({"saturation": 0.2, "blur": 0.5, "solarize": 0.1}.items(), start=4):
        is_drawn = drawn.codes[:, place] == CODES[name]
        assert stats.binomtest(int(is_drawn.sum()), COUNT, probability).pvalue > 1e-4
    sigmas = drawn.magnitudes[:, 5]
    assert stats.kstest(sigmas, stats.uniform(0.3, 0.9).cdf).pvalue > 1e-4
    assert {*drawn.magnitudes[:, 4].tolist()} == {0.0}
    assert {*drawn.magnitudes[:, 6].tolist()} == {128.0}


POLICIES = ["trivial", "randaugment", "randaugment_timm", "autoaugment", "jitter"]


@pytest.mark.parametrize("name", POLICIES)
def test_draws_are_functions_of_seed_epoch_and_sample(name: str) -> None:
    config = compose("train", ["+model=resnet", f"policy={name}"])
    policy = instantiate(config.augment.policy)
    samples = np.arange(100)
    first = policy.draw(samples, size=SIZE, seed=1, epoch=2)
    assert len({*map(bytes, first.magnitudes)}) > 5
    for part in (samples[::-1], samples[37:41]):
        again = policy.draw(part, size=SIZE, seed=1, epoch=2)
        assert np.array_equal(again.codes, first.codes[part])
        assert np.array_equal(again.magnitudes, first.magnitudes[part])
    for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}):
        assert not np.array_equal(policy.draw(samples, size=SIZE, **other).magnitudes, first.magnitudes)


def test_ranges_of_a_share_follow_the_size() -> None:
    drawn = RandAugment(magnitude=30).draw(np.arange(2000), size=(100, 331), seed=0, epoch=0)
    for name, pixels in (("translate_x", 150), ("translate_y", 45)):
        assert {*np.abs(drawn.magnitudes[drawn.codes == CODES[name]]).tolist()} == {pixels}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: TrivialAugment(num_levels=0), "num_levels=0 must be an integer from 1 to 1,000"),
        (lambda: RandAugment(magnitude=31), r"magnitude=31 must be a level of 0 to 30 \(num_levels - 1\)"),
        (lambda: RandAugment(num_ops=0), "num_ops=0 must be an integer from 1 to 1,000"),
        (lambda: RandAugment(fill=(0, 0, 256)), r"fill=\[0, 0, 256\] must be three levels from 0 to 255"),
        (lambda: TimmRandAugment(magnitude=11), "magnitude=11 must be a level of 0 to 10"),
        (lambda: TimmRandAugment(probability=2), "probability=2 must be a probability: 0 to 1"),
        (lambda: TimmRandAugment(magnitude_std=-1), "magnitude_std=-1 must be at least 0"),
        (lambda: ColorJitter(brightness=-1), "brightness=-1 must be at least 0"),
        (lambda: ColorJitter(hue=0.6), "hue=0.6 must be a part of the circle: 0 to 0.5"),
        (lambda: ColorJitter(grey=3), "grey=3 must be a probability: 0 to 1"),
        (lambda: ColorJitter(sigma=(0.1, 9)), r"sigma=\[0.1, 9\] must be a range that rises from above 0 to at most 2"),
    ],
)
def test_impossible_values_are_one_sentence(wrong: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()  # type: ignore[operator]  # each is a function
