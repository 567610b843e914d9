"""Policies: which operations each image gets, with which magnitudes, as functions of (seed, epoch, sample).

A policy draws from tables of `Choice`s, whose values are torchvision's, or timm's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from data.arguments import require, require_colour, require_probability
from data.augment.apply import CODES, IDENTITY, Operations
from data.augment.geometry import Fill
from data.augment.operations import HALF, MAX_SIGMA
from data.draws import POLICY, Samples, uniform

Draws = NDArray[np.float64]  # in [0, 1)
BLACK: Fill = (0, 0, 0)


@runtime_checkable
class Policy(Protocol):
    """Draws operations. To add one: a class with these members and a YAML in `conf/policy/`."""

    @property
    def fill(self) -> Fill:
        """Levels of the pixels that geometric operations bring in from outside."""

    def draw(self, samples: Samples, *, size: tuple[int, int], seed: int, epoch: int) -> Operations:
        """Draw the operations of each image of `size`, height and width: (N,) -> arrays (N, S)."""


class Choice(NamedTuple):
    """An operation of a policy, whose magnitude goes from `start` at level 0 to `stop` at level 1.

    `signed` negates it for half of the images; `base` is added after that. `unit` is "width" or "height" of the image,
    or nothing. `truncated` drops the fraction, as Python's `int` does.
    """

    operation: str
    start: float = 0.0
    stop: float = 0.0
    signed: bool = False
    base: float = 0.0
    unit: str = ""
    truncated: bool = False

    def magnitudes(self, levels: Draws, *, negated: NDArray[np.bool_], size: tuple[int, int]) -> Draws:
        """Return the magnitudes at levels from 0 to 1, some of them negated."""
        scale = {"height": size[0], "width": size[1]}.get(self.unit, 1)
        values = (self.start + (self.stop - self.start) * levels) * scale
        values = np.trunc(values) if self.truncated else values
        return np.where(negated & self.signed, -values, values) + self.base


def _geometric(slope: float, degrees: float, *, translations: Sequence[Choice]) -> tuple[Choice, ...]:
    shears = (Choice(name, 0, slope, signed=True) for name in ("shear_x", "shear_y"))
    return (*shears, *translations, Choice("rotate", 0, degrees, signed=True))


def _colour(strength: float, *, lost_bits: int) -> tuple[Choice, ...]:
    enhanced = ("brightness", "saturation", "contrast", "sharpness")
    return (
        *(Choice(name, 0, strength, signed=True, base=1) for name in enhanced),
        *(
            Choice("posterize", 8, 8 - lost_bits),
            Choice("solarize", 255, 0),
            Choice("autocontrast"),
            Choice("equalize"),
        ),
    )


MAX_COUNT = 1000  # of operations an image, and of levels
PIXELS = [Choice(name, 0, 32, signed=True, truncated=True) for name in ("translate_x", "translate_y")]
SHARES = [  # of the image's side
    Choice(f"translate_{axis}", 0, 150 / 331, signed=True, unit=unit, truncated=True)
    for axis, unit in (("x", "width"), ("y", "height"))
]
WIDE = (Choice(IDENTITY), *_geometric(0.99, 135, translations=PIXELS), *_colour(0.99, lost_bits=6))
NARROW = (Choice(IDENTITY), *_geometric(0.3, 30, translations=SHARES), *_colour(0.9, lost_bits=4), Choice("invert"))
TIMM_SHARED = (
    *(Choice("autocontrast"), Choice("equalize"), Choice("invert"), Choice("solarize_add", 0, 110, truncated=True)),
    *_geometric(0.3, 30, translations=[one._replace(stop=0.45, truncated=False) for one in SHARES]),
)
ENHANCED = ("saturation", "contrast", "brightness", "sharpness")
TIMM = (
    *TIMM_SHARED,
    *(Choice("posterize", 0, 4, truncated=True), Choice("solarize", 0, 256, truncated=True)),
    *(Choice(name, 0.1, 1.9) for name in ENHANCED),
)
TIMM_INCREASING = (
    *TIMM_SHARED,
    *(Choice("posterize", 0, -4, base=4, truncated=True), Choice("solarize", 0, -256, base=256, truncated=True)),
    *(Choice(name, 0, 0.9, signed=True, base=1) for name in ENHANCED),
)


def _operations(
    choices: Sequence[Choice],
    picks: NDArray[np.int64],
    *,
    levels: Draws,
    negated: NDArray[np.bool_],
    size: tuple[int, int],
) -> Operations:
    """Return the picked choices, -1 for none, as operations: all arrays (N, S)."""
    codes, magnitudes = np.full(picks.shape, CODES[IDENTITY], np.int32), np.zeros(picks.shape, np.float32)
    for number, choice in enumerate(choices):
        is_here = picks == number
        codes[is_here] = CODES[choice.operation]
        magnitudes[is_here] = choice.magnitudes(levels[is_here], negated=negated[is_here], size=size)
    return Operations(codes, magnitudes)


def _pick(draws: Draws, count: int) -> NDArray[np.int64]:
    return (draws * count).astype(np.int64)


def _check_count(**argument: object) -> None:
    ((_, value),) = argument.items()
    is_count = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_COUNT
    require(is_count, f"must be an integer from 1 to {MAX_COUNT:,}", **argument)


@dataclass(frozen=True)
class TrivialAugment:
    """One operation an image, any of 14, at any of `num_levels` magnitudes: TrivialAugment with wide ranges.

    Müller & Hutter 2021, section 3 and table 1 of the appendix. Raises: ValueError for impossible values.
    """

    num_levels: int = 31
    fill: Fill = BLACK

    def __post_init__(self) -> None:
        _check_count(num_levels=self.num_levels)
        require_colour(fill=self.fill)

    def draw(self, samples: Samples, *, size: tuple[int, int], seed: int, epoch: int) -> Operations:
        """Draw one operation per image."""
        operation, level, sign = uniform(samples, 3, seed=seed, epoch=epoch, purpose=POLICY).T[:, :, None]
        levels = _pick(level, self.num_levels) / max(1, self.num_levels - 1)
        return _operations(WIDE, _pick(operation, len(WIDE)), levels=levels, negated=sign < 0.5, size=size)


@dataclass(frozen=True)
class RandAugment:
    """`num_ops` of 14 operations an image, all at the level `magnitude` of 0 to `num_levels` - 1.

    Cubuk et al. 2020, with torchvision's ranges. Raises: ValueError for impossible values.
    """

    num_ops: int = 2
    magnitude: int = 9
    num_levels: int = 31
    fill: Fill = BLACK

    def __post_init__(self) -> None:
        _check_count(num_ops=self.num_ops)
        _check_count(num_levels=self.num_levels)
        rule = f"must be a level of 0 to {self.num_levels - 1} (num_levels - 1)"
        require(0 <= self.magnitude < self.num_levels, rule, magnitude=self.magnitude)
        require_colour(fill=self.fill)

    def draw(self, samples: Samples, *, size: tuple[int, int], seed: int, epoch: int) -> Operations:
        """Draw `num_ops` operations per image."""
        draws = uniform(samples, 2 * self.num_ops, seed=seed, epoch=epoch, purpose=POLICY)
        operation, sign = np.split(draws, 2, axis=1)  # (N, num_ops) each
        choices = [one for one in NARROW if one.operation != "invert"]
        levels = np.full_like(sign, self.magnitude / max(1, self.num_levels - 1))
        return _operations(choices, _pick(operation, len(choices)), levels=levels, negated=sign < 0.5, size=size)


@dataclass(frozen=True)
class TimmRandAugment:
    """RandAugment as in timm: `num_ops` of 15 operations, each applied with a probability, at a level of 0 to 10.

    The level is drawn from N(`magnitude`, `magnitude_std`). With `increasing`, a higher level is always a stronger
    change. timm's `rand-m9-mstd0.5-inc1` is `magnitude=9 magnitude_std=0.5 increasing=true`; its random choice of the
    interpolation is not. Raises: ValueError for impossible values.
    """

    num_ops: int = 2
    magnitude: float = 9.0
    magnitude_std: float = 0.5
    probability: float = 0.5
    increasing: bool = True
    fill: Fill = BLACK

    def __post_init__(self) -> None:
        _check_count(num_ops=self.num_ops)
        require(0 <= self.magnitude <= 10, "must be a level of 0 to 10", magnitude=self.magnitude)
        require(self.magnitude_std >= 0, "must be at least 0", magnitude_std=self.magnitude_std)
        require_probability(probability=self.probability)
        require_colour(fill=self.fill)

    def draw(self, samples: Samples, *, size: tuple[int, int], seed: int, epoch: int) -> Operations:
        """Draw `num_ops` operations per image, some of them left out."""
        draws = uniform(samples, 4 * self.num_ops, seed=seed, epoch=epoch, purpose=POLICY)
        operation, applied, level, sign = np.split(draws, 4, axis=1)  # (N, num_ops) each
        choices = TIMM_INCREASING if self.increasing else TIMM
        picks = np.where(applied < self.probability, _pick(operation, len(choices)), -1)
        spread = self.magnitude_std * ndtri(level) if self.magnitude_std else 0.0
        levels = np.clip(self.magnitude + spread, 0, 10) / 10 * np.ones_like(level)
        return _operations(choices, picks, levels=levels, negated=sign < 0.5, size=size)


# Cubuk et al. 2019, table 9: operation, probability and level of 0 to 9, two of them in a row.
IMAGENET_PAIRS = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 0), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 0)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 0)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 0), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("saturation", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 0)),
    (("equalize", 0.0, 0), ("equalize", 0.8, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("saturation", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("saturation", 1.0, 2)),
    (("saturation", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 0)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 0)),
    (("saturation", 0.4, 0), ("equalize", 0.6, 0)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("saturation", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
)


@dataclass(frozen=True)
class AutoAugment:
    """One of 25 pairs of operations an image, found by search on ImageNet: Cubuk et al. 2019, table 9.

    Ranges are torchvision's. Raises: ValueError for an impossible fill.
    """

    fill: Fill = BLACK

    def __post_init__(self) -> None:
        require_colour(fill=self.fill)

    def draw(self, samples: Samples, *, size: tuple[int, int], seed: int, epoch: int) -> Operations:
        """Draw a pair of operations per image, some of them left out."""
        draws = uniform(samples, 5, seed=seed, epoch=epoch, purpose=POLICY)
        pairs = _pick(draws[:, 0], len(IMAGENET_PAIRS))  # (N,)
        applied, sign = np.split(draws[:, 1:], 2, axis=1)  # (N, 2) each
        places = {one.operation: number for number, one in enumerate(NARROW)}
        picks = np.array([[places[name] for name, _, _ in pair] for pair in IMAGENET_PAIRS])[pairs]
        probabilities = np.array([[chance for _, chance, _ in pair] for pair in IMAGENET_PAIRS])[pairs]
        levels = np.array([[level / 9 for _, _, level in pair] for pair in IMAGENET_PAIRS])[pairs]
        picks = np.where(applied < probabilities, picks, -1)
        return _operations(NARROW, picks, levels=levels, negated=sign < 0.5, size=size)


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast, saturation and hue in a random order, each changed by up to its value, as torchvision's.

    Then, each with its own probability, grey, a blur with a deviation in `sigma` pixels, and `solarize` from the middle
    level on: Chen et al. 2020, appendix A; Grill et al. 2020, appendix B. Raises: ValueError for impossible values.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grey: float = 0.0
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    fill: Fill = field(default=BLACK, init=False)

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            require(getattr(self, name) >= 0, "must be at least 0", **{name: getattr(self, name)})
        require(0 <= self.hue <= 0.5, "must be a part of the circle: 0 to 0.5", hue=self.hue)
        for name in ("grey", "blur", "solarize"):
            require_probability(**{name: getattr(self, name)})
        sigma, rule = list(self.sigma), f"must be a range that rises from above 0 to at most {MAX_SIGMA:g} pixels"
        require(len(sigma) == 2 and 0 < sigma[0] <= sigma[1] <= MAX_SIGMA, rule, sigma=sigma)

    def draw(self, samples: Samples, *, size: tuple[int, int], seed: int, epoch: int) -> Operations:
        """Draw seven operations per image, some of them left out."""
        draws = uniform(samples, 12, seed=seed, epoch=epoch, purpose=POLICY)
        jitter, order, rest = np.split(draws, [4, 8], axis=1)  # (N, 4) each
        low, high, sigma = *self._ranges(), list(self.sigma)
        names = ("brightness", "contrast", "saturation", "hue")
        codes = np.array([CODES[name] if getattr(self, name) else CODES[IDENTITY] for name in names])
        places = order.argsort(axis=1)  # (N, 4)
        magnitudes = np.take_along_axis(low + (high - low) * jitter, places, axis=1)
        is_chosen = rest[:, :3] < [self.grey, self.blur, self.solarize]
        after = np.where(is_chosen, [CODES["saturation"], CODES["blur"], CODES["solarize"]], CODES[IDENTITY])
        deviations = sigma[0] + (sigma[1] - sigma[0]) * rest[:, 3]
        strengths = np.stack([np.zeros_like(deviations), deviations, np.full_like(deviations, HALF)], axis=1)
        return Operations(
            np.concatenate([codes[places], after], axis=1).astype(np.int32),
            np.concatenate([magnitudes, strengths], axis=1).astype(np.float32),
        )

    def _ranges(self) -> tuple[Draws, Draws]:
        """Return the lowest and the highest magnitude of brightness, contrast, saturation and hue."""
        changes = np.array([self.brightness, self.contrast, self.saturation])
        return np.append(np.maximum(0, 1 - changes), -self.hue), np.append(1 + changes, self.hue)
