"""Networks for tests, built by the name of their config or by hand, and a recipe to train them."""

from __future__ import annotations

from functools import lru_cache
from typing import Unpack

import torch
from hydra.utils import get_method
from torch import Tensor, nn

from models.layers import ConvNet, PooledLinear, StochasticDepth
from models.learning.recipe import Recipe
from models.learning.schedules import cosine
from models.options import Options, Settings, resolve_options
from pipeline.cli.compose import compose
from tests.support.published import Published


@lru_cache
def target(architecture: str) -> str:
    """Return the builder that `+model=<architecture>` names."""
    return str(compose("train", [f"+model={architecture}"]).model._target_)


def build(architecture: str, variant: str, **options: object) -> ConvNet:
    """Return the network that `+model=<architecture> model.variant=<variant>` names."""
    net = get_method(target(architecture))(variant, **options)
    assert isinstance(net, ConvNet)
    return net


def build_published(row: Published, **options: object) -> ConvNet:
    """Build the network of a row, as published."""
    own = {"num_classes": row.num_classes, "in_channels": row.in_channels, "image_size": row.image_size}
    return build(row.architecture, row.variant, **{**own, **options})


@lru_cache
def on_meta(row: Published) -> ConvNet:
    """Build the network of a row at its own image size, on torch's `meta` device."""
    with torch.device("meta"):
        return build(row.architecture, row.variant, num_classes=row.num_classes, in_channels=row.in_channels)


def scatter(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give every tensor values with an effect: initial layer scales and running means hide the layers after them."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in net.state_dict().items():
        if name.endswith("running_var") or name.endswith(("gamma", "layer_scale")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.is_floating_point():
            tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator))
    return net


def without_chance(net: nn.Module) -> nn.Module:
    """Switch off dropout and stochastic depth, also of torchvision's and timm's networks."""
    for layer in net.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        elif isinstance(layer, StochasticDepth):
            layer.rate = 0.0
        elif type(layer).__name__ == "StochasticDepth":  # torchvision's
            layer.p = 0.0
        elif type(layer).__name__ == "DropPath":  # timm's
            layer.drop_prob = 0.0
    return net


def logits_and_gradient(net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of images (N, C, H, W), and the gradient of their sum of squares with respect to the pixels."""
    pixels = images.clone().requires_grad_()
    logits = net(pixels)
    (gradient,) = torch.autograd.grad(logits.square().sum(), pixels)
    return logits.detach(), gradient


def make_recipe(**changes: object) -> Recipe:
    """Return a recipe: SGD with warm-up and cosine over two epochs, with changes."""

    def optimizer(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)

    return Recipe(**{"epochs": 2, "optimizer": optimizer, "schedule": cosine, **changes})


def plain(variant: str = "plain", **options: Unpack[Options]) -> ConvNet:
    """Build three convolutions without a norm. Shapes: (N, in_channels, H, W) -> (N, num_classes)."""
    settings = resolve_options(Settings(), options)
    stem = nn.Sequential(nn.Conv2d(settings.in_channels, 16, 3, padding=1), nn.ReLU())
    stages = {
        "stage1": nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        "stage2": nn.Sequential(nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU()),
    }
    return ConvNet(stem, stages, head=PooledLinear(32, settings.num_classes))


class Calls(nn.Module):
    """A network from a function."""

    def __init__(self, function: object, *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images, *self.layers)


class ByNumbers(nn.Module):
    """Halves inputs whose mean is large, which depends on values and not on shapes. Shapes: any -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2 if float(x.detach().abs().mean()) > 1 else x


def by_numbers(variant: str = "by_numbers", **options: Unpack[Options]) -> ConvNet:
    """Build `plain` with a layer that depends on values. Shapes: (N, in_channels, H, W) -> (N, num_classes)."""
    net = plain(variant, **options)
    net.stages.stage1.append(ByNumbers())
    return net


def grey_by_timm() -> nn.Module:
    """Build a trained network with timm's record of its input size. Shapes: (N, 1, H, W) -> (N, 4, H, W)."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4))
    net.default_cfg = {"input_size": (1, 20, 20)}
    net[1].running_mean += 1
    return net
