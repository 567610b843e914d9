"""The parts every network is built from, and the shape they all share: stem, stages, head.

Parts keep their layers in the order of torchvision's modules (timm's for CoAtNet and
MobileNetV1), so that published weights fit parameter by parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

MakeActivation = Callable[[], nn.Module]


class ConvNet(nn.Module):
    """A network as head(stages(stem(images))); every architecture of this project is one.

    `stages` run in the order given. Each is named, and each ends where the
    resolution changes, so a report can speak of a network stage by stage.

    Shapes: (N, C, H, W) -> (N, K), K classes.
    """

    def __init__(self, stem: nn.Module, stages: Mapping[str, nn.Module], *, head: nn.Module) -> None:
        super().__init__()
        self.image_size: int | None = None  # side in pixels that it was built for
        self.stem = stem
        self.stages = nn.Sequential()
        for name, stage in stages.items():
            self.stages.add_module(name, stage)
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stages(self.stem(images)))
        return logits


class PooledLinear(nn.Sequential):
    """Global average pooling, then one linear layer: the head of most networks since 2014.

    Lin et al. 2014, section 3.2. Averaging (2048, 7, 7) to 2048 features leaves
    2,049,000 head parameters for 1000 classes; flattening would need 100,353,000.
    `between` are layers by name, from the C means to the `in_features` of the last.

    Shapes: (N, C, H, W) -> (N, K), any H and W.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        dropout: float = 0.0,
        between: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)  # (N, C, H, W) -> (N, C, 1, 1)
        self.flatten = nn.Flatten()  # -> (N, C)
        for name, layer in (between or {}).items():
            self.add_module(name, layer)  # -> (N, in_features)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(in_features, num_classes)  # -> (N, K)


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from the means of all channels.

    Hu et al. 2018, section 3. The gate sees the whole image, so the receptive field
    behind this layer is global.

    Shapes: (N, C, H, W) -> (N, C, H, W), any H and W.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        *,
        activation: MakeActivation = nn.ReLU,
        gate: MakeActivation = nn.Sigmoid,
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
    """In training, leave out what a block adds to its input for a share `rate` of the images, and scale up the rest.

    Huang, Sun, Liu, Sedra & Weinberger 2016, section 3; scaling in training instead of
    evaluation keeps the same expectation.

    Shapes: any (N, ...) -> the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rate = 0.0

    def extra_repr(self) -> str:
        """The rate, for `print(net)`."""
        return f"rate={self.rate:.3g}"

    def forward(self, residual: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return residual
        keep = 1 - self.rate
        kept = residual.new_empty((residual.shape[0],) + (1,) * (residual.ndim - 1)).bernoulli_(keep)  # (N, 1, ...)
        return residual * kept.div_(keep)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of each pixel, without a copy where memory is channels_last.

    Ba, Kiros & Hinton 2016. Shapes: (N, C, H, W) -> (N, C, H, W).
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
    """A convolution that keeps H and W at stride 1, its batch norm, and maybe an activation.

    The norm's shift makes a bias superfluous.

    Shapes: (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)), odd kernels.
    """
    conv = nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        groups=groups,
        bias=False,
    )
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), *([activation()] if activation else []))


def relu() -> nn.Module:
    """ReLU that overwrites its input, which no convolution, linear layer or norm before it needs for its gradient."""
    return nn.ReLU(inplace=True)


def batch_norms(net: nn.Module) -> list[_BatchNorm]:
    """Every batch norm of `net`, those synchronised over ranks too."""
    return [layer for layer in net.modules() if isinstance(layer, _BatchNorm)]


def set_batch_norm(net: nn.Module, *, eps: float | None = None, momentum: float | None = None) -> None:
    """Give every batch norm of `net` these constants; None leaves one as it is."""
    for norm in batch_norms(net):
        norm.eps = norm.eps if eps is None else eps
        norm.momentum = norm.momentum if momentum is None else momentum


def spread_stochastic_depth(net: nn.Module, rate: float) -> None:
    """Let the rate rise evenly from 0 in the first block to `rate` in the last.

    Huang et al. 2016, equation 4, begins at 1 / L of the rate; torchvision, timm and ConvNeXt at 0.
    """
    depths = [layer for layer in net.modules() if isinstance(layer, StochasticDepth)]
    for position, depth in enumerate(depths):
        depth.rate = rate * position / max(1, len(depths) - 1)
