"""From a config to a network and its Lightning module, and whether they fit the data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from omegaconf import DictConfig
from torch import nn

from data.augment.crops import ImageSize, describe_size, height_and_width
from models.analysis.trace import FORWARD_ERRORS, TraceError, dtype_of, trace
from models.learning.averaging import Averaging
from models.learning.recipe import Recipe
from pipeline.build.objects import build_object
from pipeline.cli.errors import config_keys_in_errors

if TYPE_CHECKING:  # reports load neither Lightning nor DALI
    from data.shards.dataset import Dataset
    from models.learning.classifier import Classifier


def build_network(config: DictConfig, *, num_classes: int | None = None) -> nn.Module:
    """Build the network of `config.model`, for its own number of classes where none is given.

    Raises: ValueError for options that the network does not have, or a target that builds no network.
    """
    given = {} if num_classes is None else {"num_classes": num_classes}
    return build_object(config, "model", kind=nn.Module, **given)


def build_without_values(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network on torch's `meta` device, without memory for its weights, where its code allows that."""
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, ValueError):  # it computes with values while it is built
        return build()


def build_recipe(config: DictConfig) -> Recipe:
    """Build the recipe. Raises: ValueError for values that no training can have."""
    return build_object(config, "recipe", kind=Recipe)


def build_averaging(config: DictConfig) -> Averaging | None:
    """Build the moving average of the weights, None without one. Raises: ValueError."""
    return build_object(config, "averaging", kind=Averaging) if config.averaging else None


def build_module(config: DictConfig, net: nn.Module, *, num_classes: int, recipe: Recipe) -> Classifier:
    """Build the Lightning module, which initialises the network. Raises: ValueError."""
    from models.learning.classifier import Classifier

    with config_keys_in_errors({"freeze": "recipe.freeze"}):
        return build_object(config, "classifier", kind=Classifier, net=net, num_classes=num_classes, recipe=recipe)


def count_classes(config: DictConfig, dataset: Dataset) -> int:
    """Return the number of classes of the network: the data set's, or more where `model.num_classes` says so.

    Raises: ValueError when it is less, or when the network's images do not have three channels.
    """
    num_labels, wanted = len(dataset.classes), config.model.get("num_classes")
    num_classes = num_labels if wanted is None else wanted
    if not isinstance(num_classes, int):
        raise ValueError(f"model.num_classes={num_classes} must be an integer")
    if num_classes < num_labels:
        labels = f"labels up to {num_labels - 1}: at least {num_labels} classes are needed"
        raise ValueError(f"model.num_classes={num_classes}, but {dataset.name} has {labels}")
    if num_classes < 2:
        raise ValueError(f"{dataset.name} has one class: put its images into two or more class folders")
    channels = config.model.get("in_channels", 3)
    if channels != 3:
        raise ValueError(f"model.in_channels={channels}, but all images are decoded to 3 channels, grey ones too")
    return num_classes


def network_name(config: DictConfig) -> str:
    """Return the network's variant, or the function that builds it."""
    return str(config.model.get("variant", config.model._target_))


def check_image_sizes(config: DictConfig, net: nn.Module, *, sizes: Sequence[ImageSize]) -> None:
    """Raise ValueError unless the network accepts images of all these sizes in pixels."""
    for size in sorted({height_and_width(size) for size in sizes}):
        try:
            check_forward(net, size)
        except ValueError as error:
            network = f"{network_name(config)}, built for {config.model.get('image_size', 'other sizes')}"
            raise ValueError(f"data.image_size={describe_size(size)} does not suit {network}: {error}") from error


def check_forward(net: nn.Module, image_size: ImageSize) -> None:
    """Raise ValueError, with the reason, unless a network accepts RGB images of this size in pixels."""
    try:
        _run_forward(net, (2, 3, *height_and_width(image_size)))
    except FORWARD_ERRORS as error:
        raise ValueError(str(error).partition("\n")[0]) from error


def _run_forward(net: nn.Module, shape: tuple[int, int, int, int]) -> None:
    """Run a network in evaluation mode on a batch (N, C, H, W) without changing it.

    Shapes alone suffice for nearly every network; a copy of one that needs values runs on zeros.
    """
    try:
        trace(net, shape)
    except TraceError:
        with torch.no_grad():
            copy.deepcopy(net).eval()(torch.zeros(shape, dtype=dtype_of(net)))
