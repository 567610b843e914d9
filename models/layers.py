"""Shared layers, and the common form of every network: stem, stages, head.

Layers are registered in the order of torchvision's modules (timm's for CoAtNet and MobileNetV1), so that published
weights match parameter by parameter.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

Layers = Mapping[str, nn.Module]  # by name
MakeActivation = Callable[[], nn.Module]


class ConvNet(nn.Module):
    """head(stages(stem(images))); a stage ends where the resolution changes. Shapes: (N, C, H, W) -> (N, K).

    Raises: TypeError for a block with stochastic depth that is no `ResidualBlock`.
    """

    def __init__(self, stem: nn.Module, stages: Layers, *, head: nn.Module) -> None:
        super().__init__()
        self.image_size: int | None = None  # side in pixels the network is built for
        self.stem = stem
        self.stages = nn.Sequential(OrderedDict(stages))
        self.head = head
        for block in self.modules():
            has_residual = any(isinstance(child, StochasticDepth) for child in block.children())
            if has_residual and not isinstance(block, ResidualBlock):
                raise TypeError(f"{type(block).__name__} has stochastic depth: derive it from ResidualBlock")

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stages(self.stem(images)))
        return logits


class PooledLinear(nn.Sequential):
    """Global average pooling and a linear layer: Lin et al. 2014, section 3.2.

    Averaging (2048, 7, 7) to 2048 features leaves 2,049,000 head parameters for 1000 classes; flattening needs
    100,353,000. `between` holds named layers that map the C means to `in_features`. Shapes: (N, C, H, W) -> (N, K).
    """

    def __init__(
        self, in_features: int, num_classes: int, *, dropout: float = 0.0, between: Layers | None = None
    ) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)  # (N, C, H, W) -> (N, C, 1, 1)
        self.flatten = nn.Flatten()  # -> (N, C)
        for name, layer in (between or {}).items():
            self.add_module(name, layer)  # -> (N, in_features)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(in_features, num_classes)  # -> (N, K)


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from all channel means.

    Hu et al. 2018, section 3. The gate depends on the entire image, so the receptive field after this layer is global.
    Shapes: (N, C, H, W) -> the same, any H and W.
    """

    def __init__(
        self, channels: int, hidden: int, *, activation: MakeActivation = nn.ReLU, gate: MakeActivation = nn.Sigmoid
    ) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.activation = activation()
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        squeezed = self.activation(self.reduce(self.pool(x)))  # (N, hidden, 1, 1)
        scaled: Tensor = self.gate(self.expand(squeezed)) * x  # (N, C, 1, 1) * (N, C, H, W)
        return scaled


class StochasticDepth(nn.Module):
    """In training, drop a block's residual for a random `rate` of the images and scale up the others.

    Huang, Sun, Liu, Sedra & Weinberger 2016, section 3. The scale keeps the expectation. Shapes: (N, ...) -> the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rate = 0.0

    def extra_repr(self) -> str:
        """Return the rate, for `print(net)`."""
        return f"rate={self.rate:.3g}"

    def forward(self, residual: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return residual
        keep = 1 - self.rate
        mask = residual.new_empty((residual.shape[0],) + (1,) * (residual.ndim - 1)).bernoulli_(keep)  # (N, 1, ...)
        return residual * mask.div_(keep)


class ResidualBlock(nn.Module):
    """Base of every block that adds its result to its input; TypeError for a class without the two declarations."""

    last_norm: ClassVar[str | None]  # name in the block of the batch norm whose scale starts at zero
    no_decay: ClassVar[tuple[str, ...]]  # kernels and matrices without weight decay; any other module may declare it

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name, empty in (("last_norm", "None"), ("no_decay", "()")):
            if not hasattr(cls, name):
                raise TypeError(f"{cls.__name__} does not declare {name}: write `{name} = {empty}` if it has none")


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over each pixel's channels, without a copy in channels_last memory: Ba, Kiros & Hinton 2016.

    Shapes: (N, C, H, W) -> the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        last = x.permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        last = functional.layer_norm(last, self.normalized_shape, self.weight, self.bias, self.eps)
        return last.permute(0, 3, 1, 2)  # -> (N, C, H, W)


def conv_norm(
    in_channels: int,
    out_channels: int,
    *,
    kernel_size: int,
    stride: int = 1,
    groups: int = 1,
    activation: MakeActivation | None = None,
) -> nn.Sequential:
    """Build a convolution without bias, a batch norm and an optional activation.

    Shapes, for an odd kernel: (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """
    padding = kernel_size // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), *([activation()] if activation else []))


def relu() -> nn.Module:
    """Build an in-place ReLU: no convolution, linear layer or norm needs its own output for the gradient."""
    return nn.ReLU(inplace=True)


def batch_norms(net: nn.Module) -> list[_BatchNorm]:
    """Return every batch norm of `net`, including those synchronised over ranks."""
    return [layer for layer in net.modules() if isinstance(layer, _BatchNorm)]


def set_batch_norm(net: nn.Module, *, eps: float | None = None, momentum: float | None = None) -> None:
    """Set the constants of every batch norm of `net`; None keeps the current value."""
    for norm in batch_norms(net):
        norm.eps = norm.eps if eps is None else eps
        norm.momentum = norm.momentum if momentum is None else momentum


def zero_last_norms(net: nn.Module) -> None:
    """Start every block as its shortcut. Raises: AttributeError, TypeError for a `last_norm` that is no batch norm."""
    for block in net.modules():
        if isinstance(block, ResidualBlock) and block.last_norm is not None:
            norm = block.get_submodule(block.last_norm)
            if not isinstance(norm, _BatchNorm):
                raise TypeError(f"{type(block).__name__}.last_norm={block.last_norm} is a {type(norm).__name__}")
            nn.init.zeros_(norm.weight)


def undecayed_parameters(net: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that modules declare as `no_decay`. Raises: AttributeError for an unknown name."""
    return {module.get_parameter(name) for module in net.modules() for name in getattr(module, "no_decay", ())}


def spread_stochastic_depth(net: nn.Module, rate: float) -> None:
    """Assign rates that rise linearly from 0, as in torchvision, timm and ConvNeXt; Huang et al. start at 1 / L."""
    depths = [layer for layer in net.modules() if isinstance(layer, StochasticDepth)]
    for position, depth in enumerate(depths):
        depth.rate = rate * position / max(1, len(depths) - 1)
