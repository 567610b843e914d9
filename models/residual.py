"""ResNet, Wide ResNet and ResNeXt: blocks that add their input to their result, y = F(x) + x.

He, Zhang, Ren & Sun 2016, "Deep residual learning for image recognition", table 1
Zagoruyko & Komodakis 2016, "Wide residual networks", table 8: ResNet-50-2-bottleneck
Xie, Girshick, Dollár, Tu & He 2017, "Aggregated residual transformations for deep neural networks", table 1

The sum gives dL/dx = dL/dy (1 + dF/dx): the 1 carries the gradient past any number of blocks. In shapes H' is
ceil(H / stride), W' alike.
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

from torch import Tensor, nn

from models.layers import ConvNet, PooledLinear, ResidualBlock, StochasticDepth, conv_norm, relu
from models.options import Options, Settings, apply_options, find_variant, resolve_options


class Variant(NamedTuple):
    """A column of a paper's table 1."""

    block: type[BasicBlock | Bottleneck]
    depths: tuple[int, int, int, int]
    groups: int = 1  # "cardinality" in Xie et al.
    group_width: int = 64  # channels of one group in the first stage's 3x3; a wide ResNet has twice as many


def _shortcut(in_channels: int, out_channels: int, *, stride: int) -> nn.Module:
    """Return the identity for equal shapes, else a strided 1x1 projection: option B of He et al., section 3.3."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return conv_norm(in_channels, out_channels, kernel_size=1, stride=stride)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions: figure 5, left, of He et al. Shapes: (N, in_channels, H, W) -> (N, width, H', W')."""

    expansion = 1
    last_norm = "conv2.1"
    no_decay = ()

    def __init__(self, in_channels: int, width: int, *, stride: int, variant: Variant) -> None:
        super().__init__()
        assert variant.groups == 1, "no paper groups the two-layer block"
        self.conv1 = conv_norm(in_channels, width, kernel_size=3, stride=stride, activation=relu)
        self.conv2 = conv_norm(width, width, kernel_size=3)
        self.shortcut = _shortcut(in_channels, width, stride=stride)
        self.stochastic_depth = StochasticDepth()
        self.relu = relu()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv2(self.conv1(x))  # (N, width, H', W')
        activated: Tensor = self.relu(self.stochastic_depth(residual) + self.shortcut(x))
        return activated


class Bottleneck(ResidualBlock):
    """1x1, grouped 3x3, 1x1: figure 5, right, of He et al. Shapes: (N, in_channels, H, W) -> (N, 4 width, H', W')."""

    expansion = 4
    last_norm = "conv3.1"
    no_decay = ()

    def __init__(self, in_channels: int, width: int, *, stride: int, variant: Variant) -> None:
        super().__init__()
        groups, out_channels = variant.groups, width * self.expansion
        inner = groups * (width * variant.group_width // 64)  # Xie et al.: width doubles with each stage
        self.conv1 = conv_norm(in_channels, inner, kernel_size=1, activation=relu)
        # Stride sits on the 3x3, not the first 1x1 (ResNet v1.5): same cost, and the 1x1 then reads every pixel.
        self.conv2 = conv_norm(inner, inner, kernel_size=3, stride=stride, groups=groups, activation=relu)
        self.conv3 = conv_norm(inner, out_channels, kernel_size=1)
        self.shortcut = _shortcut(in_channels, out_channels, stride=stride)
        self.stochastic_depth = StochasticDepth()
        self.relu = relu()

    def forward(self, x: Tensor) -> Tensor:
        narrow = self.conv2(self.conv1(x))  # (N, inner, H', W')
        residual = self.conv3(narrow)  # (N, 4 width, H', W')
        activated: Tensor = self.relu(self.stochastic_depth(residual) + self.shortcut(x))
        return activated


# He et al. table 1; wide_resnet50_2 is Zagoruyko & Komodakis table 8, wide_resnet101_2 torchvision's.
RESNETS = {
    "resnet18": Variant(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Variant(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Variant(Bottleneck, (3, 4, 6, 3)),
    "resnet101": Variant(Bottleneck, (3, 4, 23, 3)),
    "resnet152": Variant(Bottleneck, (3, 8, 36, 3)),
    "wide_resnet50_2": Variant(Bottleneck, (3, 4, 6, 3), group_width=128),
    "wide_resnet101_2": Variant(Bottleneck, (3, 4, 23, 3), group_width=128),
}
# Xie et al. tables 1 and 4; 101_32x8d is torchvision's.
RESNEXTS = {
    "resnext50_32x4d": Variant(Bottleneck, (3, 4, 6, 3), groups=32, group_width=4),
    "resnext101_32x8d": Variant(Bottleneck, (3, 4, 23, 3), groups=32, group_width=8),
    "resnext101_64x4d": Variant(Bottleneck, (3, 4, 23, 3), groups=64, group_width=4),
}
STAGE_WIDTHS = (64, 128, 256, 512)


def _stem(in_channels: int, *, small: bool) -> nn.Sequential:
    """Build a 7x7 at stride 2 and a pooling, as in table 1; for small images the 3x3 of section 4.2."""
    if small:  # under the same names, so that an error on the other's weights shows which shapes differ
        return nn.Sequential(conv_norm(in_channels, 64, kernel_size=3, activation=relu))
    conv = conv_norm(in_channels, 64, kernel_size=7, stride=2, activation=relu)
    return nn.Sequential(conv, nn.MaxPool2d(3, stride=2, padding=1))


def _build(variant: Variant, options: Options) -> ConvNet:
    settings = resolve_options(Settings(), options)
    features = STAGE_WIDTHS[-1] * variant.block.expansion
    head = PooledLinear(features, settings.num_classes, dropout=settings.dropout)
    stem = _stem(settings.in_channels, small=settings.small)
    in_channels = 64
    stages: dict[str, nn.Module] = {}
    for number, (width, depth) in enumerate(zip(STAGE_WIDTHS, variant.depths, strict=True), start=1):
        stage = stages[f"stage{number}"] = nn.Sequential()
        for position in range(depth):
            stride = 2 if number > 1 and position == 0 else 1
            stage.append(variant.block(in_channels, width, stride=stride, variant=variant))
            in_channels = width * variant.block.expansion
    return apply_options(ConvNet(stem, stages, head=head), settings, options=options)


def resnet(variant: str = "resnet50", **options: Unpack[Options]) -> ConvNet:
    """Build a ResNet or Wide ResNet, equal to torchvision's. Up to 64 pixels: a 3x3 stem without stride or pooling."""
    return _build(find_variant(variant, RESNETS), options)


def resnext(variant: str = "resnext50_32x4d", **options: Unpack[Options]) -> ConvNet:
    """Build a ResNeXt, equal to torchvision's. Up to 64 pixels: a 3x3 stem without stride or pooling."""
    return _build(find_variant(variant, RESNEXTS), options)
