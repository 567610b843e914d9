"""The options that every builder takes beside its variant, and their effect on a network.

Every builder returns a network of shapes (N, in_channels, H, W) -> (N, num_classes), with the parameters of the named
publication. It raises ValueError for an unknown variant, an impossible option, or an image size that it does not take.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypedDict, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.arguments import ArgumentError, require
from models.layers import ConvNet, StochasticDepth, set_batch_norm, spread_stochastic_depth

SMALL_IMAGE = 64  # largest side in pixels for which networks get a stem without early stride

V = TypeVar("V")


class Options(TypedDict, total=False):
    """The options of all builders. A missing option, or None, takes the value of the variant's paper."""

    num_classes: int
    in_channels: int
    # Side in pixels, of rectangles the longer one. Up to 64, the stem has no early stride. Most networks run on others.
    image_size: int | Sequence[int] | None
    dropout: float | None  # rate before the last linear layer; in AlexNet and VGG before two of the three
    stochastic_depth: float | None  # rate of the last block, falling linearly to 0 at the first
    norm_eps: float | None  # constants of the batch norms
    norm_momentum: float | None


class Settings(NamedTuple):
    """Options with a value each. The defaults are ResNet's and VGG's."""

    num_classes: int = 1000
    in_channels: int = 3
    image_size: int = 224
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    norm_eps: float = 1e-5
    norm_momentum: float = 0.1

    @property
    def small(self) -> bool:
        """Whether the stem keeps the resolution."""
        return self.image_size <= SMALL_IMAGE


def find_variant(variant: str, variants: Mapping[str, V]) -> V:
    """Return the row of a variant. Raises: ValueError, with the nearest name, when there is none."""
    if variant not in variants:
        near = difflib.get_close_matches(str(variant), variants, n=1, cutoff=0)[0]
        raise ArgumentError(("variant", variant), f" is not one of {', '.join(variants)}: did you mean {near}?")
    return variants[variant]


def resolve_options(own: Settings, options: Options, *, at_least: int = 1) -> Settings:
    """Return a network's own settings, overridden by the given options; `at_least` is its smallest image size.

    Raises: ValueError for unknown options and impossible values.
    """
    known = Settings._fields
    for name, value in sorted(options.items()):
        require(name in known, f"is not an option of networks: choose from {', '.join(known)}", **{name: value})
    given = {name: value for name, value in options.items() if value is not None}
    size, shortest = given.get("image_size"), None
    if isinstance(size, Sequence) and len(size) == 2 and all(isinstance(side, int) for side in size):
        given["image_size"], shortest = max(size), min(size)
    settings = Settings(**(own._asdict() | given))
    for name, value in settings._asdict().items():
        is_float = isinstance(Settings._field_defaults[name], float)
        types, words = ((int, float), "a number") if is_float else (int, "an integer")
        require(isinstance(value, types) and not isinstance(value, bool), f"must be {words}", **{name: value})
    require(settings.num_classes >= 2, "must be at least 2 for a classifier", num_classes=settings.num_classes)
    require(settings.in_channels >= 1, "must be at least 1", in_channels=settings.in_channels)
    rule = f"must be at least {at_least} for this network"
    is_large_enough = (settings.image_size if shortest is None else shortest) >= at_least
    require(is_large_enough, rule, image_size=size or settings.image_size)
    for name in ("dropout", "stochastic_depth"):
        rate = getattr(settings, name)
        require(0 <= rate < 1, "must be at least 0 and less than 1", **{name: rate})
    require(settings.norm_eps > 0, "must be above 0", norm_eps=settings.norm_eps)  # NaN is not
    require(0 < settings.norm_momentum <= 1, "must be above 0 and at most 1", norm_momentum=settings.norm_momentum)
    return settings


def apply_options(net: ConvNet, settings: Settings, *, options: Options) -> ConvNet:
    """Set a network up and return it. Raises: ValueError when it has no layers that a given option is for."""
    net.image_size = settings.image_size
    set_batch_norm(net, eps=settings.norm_eps, momentum=settings.norm_momentum)
    spread_stochastic_depth(net, settings.stochastic_depth)
    layers = list(net.modules())
    kinds = {"norm_eps": _BatchNorm, "norm_momentum": _BatchNorm, "stochastic_depth": StochasticDepth}
    for name, kind in (kinds | {"dropout": nn.Dropout}).items():
        if options.get(name) and not any(isinstance(layer, kind) for layer in layers):
            raise ArgumentError((name, options.get(name)), ": this network has no layer that uses it: leave it out")
    return net
