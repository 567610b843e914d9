"""Schedules of the learning rate: from the completed fraction of the steps after the warm-up, 0 to 1, to a factor."""

import itertools
import math
from collections.abc import Callable, Sequence

from models.arguments import require

Schedule = Callable[[float], float]


def cosine(progress: float, *, final_fraction: float = 0.0) -> float:
    """Fall by half a cosine to `final_fraction` (Loshchilov & Hutter 2017, eq. 5)."""
    _check_fraction(final_fraction)
    return final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * progress)) / 2


def linear(progress: float, *, final_fraction: float = 0.0) -> float:
    """Fall by a straight line to `final_fraction`."""
    _check_fraction(final_fraction)
    return final_fraction + (1 - final_fraction) * (1 - progress)


def exponential(progress: float, *, final_fraction: float = 0.01) -> float:
    """Fall by a constant factor per step to `final_fraction`.

    Tan & Le 2019, section 5.2, multiply by 0.97 every 2.4 epochs: 0.0118 is left after 350.
    """
    _check_fraction(final_fraction)
    return float(final_fraction**progress)


def milestones(progress: float, *, milestones: Sequence[float] = (1 / 3, 2 / 3), factor: float = 0.1) -> float:
    """Multiply by `factor` at each of `milestones`, fractions like `progress`.

    Krizhevsky et al. 2012, section 5, and He et al. 2016, section 3.4, divide by 10 when the error stops falling;
    torchvision's references do so after 30 and 60 of 90 epochs.
    """
    is_rising = all(one < other for one, other in itertools.pairwise((0.0, *map(_number, milestones), 1.0)))
    require(is_rising, "must be rising fractions of the training, above 0 and below 1", milestones=list(milestones))
    require(0 <= _number(factor) <= 1, "must be a number from 0 to 1", factor=factor)
    return float(factor ** sum(progress >= milestone for milestone in milestones))


def _check_fraction(final_fraction: float) -> None:
    rule = "must be the last rate as a fraction of the highest, from 0 to 1"
    require(0 <= _number(final_fraction) <= 1, rule, final_fraction=final_fraction)


def _number(value: object) -> float:
    """Return a number, NaN for what is none: it fails every comparison."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
