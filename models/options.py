"""The options that every builder takes beside its variant, and their effect on a network.

Every builder returns a network of shapes (N, in_channels, H, W) -> (N, num_classes), with the parameters of the named
publication. It raises ValueError for an unknown variant, an impossible option, or an image size that it does not take.
"""

import difflib
from collections.abc import Mapping
from typing import NamedTuple, TypedDict, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.layers import ConvNet, StochasticDepth, set_batch_norm, spread_stochastic_depth

SMALL_IMAGE = 64  # largest side in pixels for which networks get a stem without early stride

V = TypeVar("V")


class Options(TypedDict, total=False):
    """The options of all builders. A missing option, or None, takes the value of the variant's paper."""

    num_classes: int
    in_channels: int
    image_size: int | None  # side in pixels; up to 64, the stem has no early stride. Most networks run on others too
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
        raise ValueError(f"variant={variant} is not one of {', '.join(variants)}: did you mean {near}?")
    return variants[variant]


def _check_types(settings: Settings) -> None:
    for name, default in Settings._field_defaults.items():
        value = getattr(settings, name)
        types, words = ((int, float), "a number") if isinstance(default, float) else (int, "an integer")
        if isinstance(value, bool) or not isinstance(value, types):
            raise ValueError(f"{name}={value} must be {words}")


def resolve_options(own: Settings, options: Options, *, at_least: int = 1) -> Settings:
    """Return a network's own settings, overridden by the given options; `at_least` is its smallest image size.

    Raises: ValueError for unknown options and impossible values.
    """
    for name, value in sorted(options.items()):
        if name not in Settings._fields:
            raise ValueError(f"{name}={value} is not an option of networks: choose from {', '.join(Settings._fields)}")
    settings = Settings(**(own._asdict() | {name: value for name, value in options.items() if value is not None}))
    _check_types(settings)
    if settings.num_classes < 2:
        raise ValueError(f"num_classes={settings.num_classes}: a classifier needs at least 2 classes")
    if settings.in_channels < 1:
        raise ValueError(f"in_channels={settings.in_channels} must be at least 1")
    if settings.image_size < at_least:
        raise ValueError(f"image_size={settings.image_size}: this network takes images of {at_least} pixels and more")
    for name in ("dropout", "stochastic_depth"):
        if not 0 <= getattr(settings, name) < 1:
            raise ValueError(f"{name}={getattr(settings, name)} must be at least 0 and less than 1")
    if not settings.norm_eps > 0:  # nor NaN
        raise ValueError(f"norm_eps={settings.norm_eps} must be above 0")
    if not 0 < settings.norm_momentum <= 1:
        raise ValueError(f"norm_momentum={settings.norm_momentum} must be above 0 and at most 1")
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
            raise ValueError(f"{name}={options.get(name)}: this network has no layer that uses it: leave it out")
    return net
