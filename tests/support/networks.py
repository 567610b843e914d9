"""Networks that tests need: built by the name of their config, or small and without batch norm."""

from __future__ import annotations

from functools import lru_cache
from typing import Unpack

import torch
from hydra.utils import get_method
from torch import Tensor, nn

from models.layers import ConvNet, PooledLinear, StochasticDepth
from models.options import Options, Settings, settle
from pipeline.cli.config import compose
from tests.support.published import Published


@lru_cache
def target(architecture: str) -> str:
    """The builder that `+model=<architecture>` names."""
    return str(compose("train", [f"+model={architecture}"]).model._target_)


def build(architecture: str, variant: str, **options: object) -> ConvNet:
    """The network that `+model=<architecture> model.variant=<variant>` names."""
    net = get_method(target(architecture))(variant, **options)
    assert isinstance(net, ConvNet)
    return net


def build_published(row: Published, **options: object) -> ConvNet:
    """The network of a row, as it was published."""
    own = {"num_classes": row.num_classes, "in_channels": row.in_channels, "image_size": row.image_size}
    return build(row.architecture, row.variant, **{**own, **options})


@lru_cache
def on_meta(row: Published) -> ConvNet:
    """The network of a row at its own image size, shapes without numbers."""
    with torch.device("meta"):
        return build(row.architecture, row.variant, num_classes=row.num_classes, in_channels=row.in_channels)


def scatter(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give every tensor values that matter: as built, layer scales and running means hide what lies behind them."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in net.state_dict().items():
        if name.endswith("running_var") or name.endswith(("gamma", "layer_scale")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.is_floating_point():
            tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator))
    return net


def without_chance(net: nn.Module) -> nn.Module:
    """The network with dropout and stochastic depth switched off, whoever wrote it."""
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
    """What the network makes of images (N, C, H, W), and how the sum of the squares depends on them."""
    pixels = images.clone().requires_grad_()
    logits = net(pixels)
    (gradient,) = torch.autograd.grad(logits.square().sum(), pixels)
    return logits.detach(), gradient


def plain(variant: str = "plain", **options: Unpack[Options]) -> ConvNet:
    """Three convolutions without a norm. Shapes: (N, in_channels, H, W) -> (N, num_classes)."""
    settings = settle(Settings(), options)
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
    """Halves what is large on the whole, which shapes alone cannot tell. Shapes: any -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2 if float(x.detach().abs().mean()) > 1 else x


def by_numbers(variant: str = "by_numbers", **options: Unpack[Options]) -> ConvNet:
    """`plain`, with a part that looks at the numbers. Shapes: (N, in_channels, H, W) -> (N, num_classes)."""
    net = plain(variant, **options)
    net.stages.stage1.append(ByNumbers())
    return net


def grey_by_timm() -> nn.Module:
    """A trained network that says as timm's do which images it takes. Shapes: (N, 1, H, W) -> (N, 4, H, W)."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4))
    net.default_cfg = {"input_size": (1, 20, 20)}
    net[1].running_mean += 1
    return net
