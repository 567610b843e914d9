"""ResNet, Wide ResNet and ResNeXt: blocks that add their input to their result, y = F(x) + x.

He, Zhang, Ren & Sun 2016, "Deep residual learning for image recognition", table 1
Zagoruyko & Komodakis 2016, "Wide residual networks", table 8: ResNet-50-2-bottleneck
Xie, Girshick, Dollár, Tu & He 2017, "Aggregated residual transformations for deep neural networks", table 1

The sum gives dL/dx = dL/dy (1 + dF/dx): the 1 carries the gradient past any number of blocks.
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


def shortcut(in_channels: int, out_channels: int, *, stride: int) -> nn.Module:
    """Return the identity for equal shapes, else a strided 1x1 projection: option B of He et al., section 3.3.

    Shapes: (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return conv_norm(in_channels, out_channels, kernel_size=1, stride=stride)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions and a shortcut: figure 5, left, of He et al.

    Shapes: (N, in_channels, H, W) -> (N, width, ceil(H / stride), ceil(W / stride)).
    """

    expansion = 1
    last_norm = "conv2.1"
    no_decay = ()

    def __init__(self, in_channels: int, width: int, *, stride: int, variant: Variant) -> None:
        super().__init__()
        assert variant.groups == 1, "no paper groups the two-layer block"
        self.conv1 = conv_norm(in_channels, width, kernel_size=3, stride=stride, activation=relu)
        self.conv2 = conv_norm(width, width, kernel_size=3)
        self.shortcut = shortcut(in_channels, width, stride=stride)
        self.stochastic_depth = StochasticDepth()
        self.relu = relu()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv2(self.conv1(x))  # (N, width, H / stride, W / stride)
        activated: Tensor = self.relu(self.stochastic_depth(residual) + self.shortcut(x))
        return activated


class Bottleneck(ResidualBlock):
    """1x1 to fewer channels, grouped 3x3, 1x1 to four times as many: figure 5, right, of He et al.

    Shapes: (N, in_channels, H, W) -> (N, 4 width, ceil(H / stride), ceil(W / stride)).
    """

    expansion = 4
    last_norm = "conv3.1"
    no_decay = ()

    def __init__(self, in_channels: int, width: int, *, stride: int, variant: Variant) -> None:
        super().__init__()
        groups = variant.groups
        inner = groups * (width * variant.group_width // 64)  # Xie et al.: width doubles with each stage
        out_channels = width * self.expansion
        self.conv1 = conv_norm(in_channels, inner, kernel_size=1, activation=relu)
        # Stride sits on the 3x3, not the first 1x1 (ResNet v1.5): same cost, and the 1x1 then reads every pixel.
        self.conv2 = conv_norm(inner, inner, kernel_size=3, stride=stride, groups=groups, activation=relu)
        self.conv3 = conv_norm(inner, out_channels, kernel_size=1)
        self.shortcut = shortcut(in_channels, out_channels, stride=stride)
        self.stochastic_depth = StochasticDepth()
        self.relu = relu()

    def forward(self, x: Tensor) -> Tensor:
        narrow = self.conv1(x)  # (N, inner, H, W)
        spatial = self.conv2(narrow)  # (N, inner, H / stride, W / stride)
        residual = self.conv3(spatial)  # (N, 4 width, H / stride, W / stride)
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


def stem(in_channels: int, *, small: bool) -> nn.Sequential:
    """Build a 7x7 at stride 2 and a pooling, as in table 1; for small images the 3x3 of section 4.2.

    Shapes: (N, in_channels, H, W) -> (N, 64, ceil(H / 4), ceil(W / 4)), for small images (N, 64, H, W).
    """
    if small:  # under the same names, so that an error on the other's weights shows which shapes differ
        return nn.Sequential(conv_norm(in_channels, 64, kernel_size=3, activation=relu))
    conv = conv_norm(in_channels, 64, kernel_size=7, stride=2, activation=relu)
    return nn.Sequential(conv, nn.MaxPool2d(3, stride=2, padding=1))


def stages(variant: Variant) -> dict[str, nn.Module]:
    """Build four stages of blocks. All but the first halve H and W in their first block."""
    in_channels = 64
    built: dict[str, nn.Module] = {}
    for number, (width, depth) in enumerate(zip(STAGE_WIDTHS, variant.depths, strict=True), start=1):
        blocks: list[nn.Module] = []
        for position in range(depth):
            stride = 2 if number > 1 and position == 0 else 1
            blocks.append(variant.block(in_channels, width, stride=stride, variant=variant))
            in_channels = width * variant.block.expansion
        built[f"stage{number}"] = nn.Sequential(*blocks)
    return built


def build(variant: Variant, options: Options) -> ConvNet:
    """Build the network of a variant. Raises: ValueError for impossible options."""
    settings = resolve_options(Settings(), options)
    features = STAGE_WIDTHS[-1] * variant.block.expansion
    head = PooledLinear(features, settings.num_classes, dropout=settings.dropout)
    net = ConvNet(stem(settings.in_channels, small=settings.small), stages(variant), head=head)
    return apply_options(net, settings, options=options)


def resnet(variant: str = "resnet50", **options: Unpack[Options]) -> ConvNet:
    """Build a ResNet with 18 to 152 layers, or of twice the width, equal to torchvision's of the same name.

    Up to 64 pixels: a first 3x3 kernel without stride or pooling.

    Shapes: (N, in_channels, H, W) -> (N, num_classes), H and W at least 1.
    Raises: ValueError for an unknown variant or fewer than two classes.
    """
    return build(find_variant(variant, RESNETS), options)


def resnext(variant: str = "resnext50_32x4d", **options: Unpack[Options]) -> ConvNet:
    """Build a ResNeXt with 50 or 101 layers, equal to torchvision's of the same name.

    Up to 64 pixels: a first 3x3 kernel without stride or pooling.

    Shapes: (N, in_channels, H, W) -> (N, num_classes), H and W at least 1.
    Raises: ValueError for an unknown variant or fewer than two classes.
    """
    return build(find_variant(variant, RESNEXTS), options)
