"""MobileNet and EfficientNet: a standard convolution factorised into one filter per channel and a 1x1 convolution.

Howard et al. 2017, "MobileNets", table 1
Sandler, Howard, Zhu, Zhmoginov & Chen 2018, "MobileNetV2", table 2
Howard et al. 2019, "Searching for MobileNetV3", tables 1 and 2
Tan & Le 2019, "EfficientNet", table 1, scaled as in section 3.3
Tan & Le 2021, "EfficientNetV2", table 4 for S; M and L as in its code

The two factors cost 1 / C_out + 1 / K^2 of a K x K convolution, an eighth to a ninth for 3x3. Depthwise kernels have
no weight decay: they have so few weights (Howard et al. 2017, section 3.2). For images up to 64 pixels the stem and the
first strided block have no stride. In shapes H' is ceil(H / stride).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Unpack

from torch import Tensor, nn

from models.layers import ConvNet, PooledLinear, ResidualBlock, SqueezeExcite, StochasticDepth, conv_norm, relu
from models.options import Options, Settings, apply_options, find_variant, resolve_options

relu6 = partial(nn.ReLU6, inplace=True)
hardswish = partial(nn.Hardswish, inplace=True)
silu = partial(nn.SiLU, inplace=True)


class Block(NamedTuple):
    """One block: its class, input, inner and output channels, and the layers between them."""

    kind: Callable[[Block], nn.Module]
    in_channels: int
    inner: int
    out_channels: int
    kernel_size: int
    stride: int
    activation: Callable[[], nn.Module]
    gate: Callable[[int], SqueezeExcite] | None = None  # from the number of channels


def _depthwise(block: Block, channels: int) -> nn.Sequential:
    layer = partial(conv_norm, kernel_size=block.kernel_size, stride=block.stride, activation=block.activation)
    return layer(channels, channels, groups=channels)


class SeparableConv(nn.Sequential):
    """Figure 3, right, of Howard et al. 2017. Shapes: (N, in_channels, H, W) -> (N, out_channels, H', W')."""

    no_decay = ("depthwise.0.weight",)

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.depthwise = _depthwise(block, block.in_channels)
        self.pointwise = conv_norm(block.in_channels, block.out_channels, kernel_size=1, activation=block.activation)


class InvertedResidual(ResidualBlock):
    """1x1 to more channels, depthwise, 1x1 back without activation; a shortcut between the narrow ends.

    Figure 4 of Sandler et al.; with a gate, figure 4 of Howard et al. 2019, and the MBConv of EfficientNet. A block
    that does not expand has no first 1x1. Shapes: (N, in_channels, H, W) -> (N, out_channels, H', W').
    """

    last_norm = None
    no_decay = ("depthwise.0.weight",)

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.expand: nn.Module = nn.Identity()
        if block.inner != block.in_channels:
            self.expand = conv_norm(block.in_channels, block.inner, kernel_size=1, activation=block.activation)
        self.depthwise = _depthwise(block, block.inner)
        self.gate = block.gate(block.inner) if block.gate else nn.Identity()
        self.project = conv_norm(block.inner, block.out_channels, kernel_size=1)
        self.stochastic_depth = StochasticDepth()
        self.has_shortcut = block.stride == 1 and block.in_channels == block.out_channels

    def forward(self, x: Tensor) -> Tensor:
        wide = self.depthwise(self.expand(x))  # (N, inner, H', W')
        narrow: Tensor = self.project(self.gate(wide))  # (N, out_channels, H', W')
        return self.stochastic_depth(narrow) + x if self.has_shortcut else narrow


class FusedInvertedResidual(ResidualBlock):
    """An inverted residual whose first 1x1 and depthwise are one standard convolution: figure 2 of Tan & Le 2021.

    One that does not expand has no second convolution. Shapes: (N, in_channels, H, W) -> (N, out_channels, H', W').
    """

    last_norm = None
    no_decay = ()

    def __init__(self, block: Block) -> None:
        super().__init__()
        size, stride, activation = block.kernel_size, block.stride, block.activation
        self.expand = conv_norm(block.in_channels, block.inner, kernel_size=size, stride=stride, activation=activation)
        self.project: nn.Module = nn.Identity()
        if block.inner != block.in_channels:
            self.project = conv_norm(block.inner, block.out_channels, kernel_size=1)
        self.stochastic_depth = StochasticDepth()
        self.has_shortcut = stride == 1 and block.in_channels == block.out_channels

    def forward(self, x: Tensor) -> Tensor:
        narrow: Tensor = self.project(self.expand(x))  # (N, out_channels, H', W')
        return self.stochastic_depth(narrow) + x if self.has_shortcut else narrow


class Row(NamedTuple):
    """A row of table 2 of Sandler et al., of table 1 of Tan & Le 2019, of table 4 of Tan & Le 2021 or its code."""

    block: type[InvertedResidual] | type[FusedInvertedResidual]
    expansion: int
    kernel_size: int
    stride: int  # of the first block
    out_channels: int
    depth: int


class Variant(NamedTuple):
    """Blocks and the widths around them: `last` of the 1x1 after them, `hidden` of a layer in the head; 0: none."""

    stem: int
    blocks: tuple[Block, ...]
    last: int
    hidden: int
    activation: Callable[[], nn.Module]
    settings: Settings


# Output channels and stride of each depthwise-separable layer: table 1 of Howard et al. 2017.
MOBILENET_V1 = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *5 * ((512, 1),), (1024, 2), (1024, 1))
MOBILENET_V2 = (
    Row(InvertedResidual, 1, 3, 1, 16, 1),
    Row(InvertedResidual, 6, 3, 2, 24, 2),
    Row(InvertedResidual, 6, 3, 2, 32, 3),
    Row(InvertedResidual, 6, 3, 2, 64, 4),
    Row(InvertedResidual, 6, 3, 1, 96, 3),
    Row(InvertedResidual, 6, 3, 2, 160, 3),
    Row(InvertedResidual, 6, 3, 1, 320, 1),
)
# Kernel size, inner and output channels, gate, activation and stride: tables 1 and 2 of Howard et al. 2019.
MOBILENET_V3_LARGE = (
    (3, 16, 16, False, relu, 1),
    (3, 64, 24, False, relu, 2),
    (3, 72, 24, False, relu, 1),
    (5, 72, 40, True, relu, 2),
    (5, 120, 40, True, relu, 1),
    (5, 120, 40, True, relu, 1),
    (3, 240, 80, False, hardswish, 2),
    (3, 200, 80, False, hardswish, 1),
    (3, 184, 80, False, hardswish, 1),
    (3, 184, 80, False, hardswish, 1),
    (3, 480, 112, True, hardswish, 1),
    (3, 672, 112, True, hardswish, 1),
    (5, 672, 160, True, hardswish, 2),
    (5, 960, 160, True, hardswish, 1),
    (5, 960, 160, True, hardswish, 1),
)
MOBILENET_V3_SMALL = (
    (3, 16, 16, True, relu, 2),
    (3, 72, 24, False, relu, 2),
    (3, 88, 24, False, relu, 1),
    (5, 96, 40, True, hardswish, 2),
    (5, 240, 40, True, hardswish, 1),
    (5, 240, 40, True, hardswish, 1),
    (5, 120, 48, True, hardswish, 1),
    (5, 144, 48, True, hardswish, 1),
    (5, 288, 96, True, hardswish, 2),
    (5, 576, 96, True, hardswish, 1),
    (5, 576, 96, True, hardswish, 1),
)
EFFICIENTNET_B0 = (
    Row(InvertedResidual, 1, 3, 1, 16, 1),
    Row(InvertedResidual, 6, 3, 2, 24, 2),
    Row(InvertedResidual, 6, 5, 2, 40, 2),
    Row(InvertedResidual, 6, 3, 2, 80, 3),
    Row(InvertedResidual, 6, 5, 1, 112, 3),
    Row(InvertedResidual, 6, 5, 2, 192, 4),
    Row(InvertedResidual, 6, 3, 1, 320, 1),
)
EFFICIENTNET_V2_S = (
    Row(FusedInvertedResidual, 1, 3, 1, 24, 2),
    Row(FusedInvertedResidual, 4, 3, 2, 48, 4),
    Row(FusedInvertedResidual, 4, 3, 2, 64, 4),
    Row(InvertedResidual, 4, 3, 2, 128, 6),
    Row(InvertedResidual, 6, 3, 1, 160, 9),
    Row(InvertedResidual, 6, 3, 2, 256, 15),
)
EFFICIENTNET_V2_M = (
    Row(FusedInvertedResidual, 1, 3, 1, 24, 3),
    Row(FusedInvertedResidual, 4, 3, 2, 48, 5),
    Row(FusedInvertedResidual, 4, 3, 2, 80, 5),
    Row(InvertedResidual, 4, 3, 2, 160, 7),
    Row(InvertedResidual, 6, 3, 1, 176, 14),
    Row(InvertedResidual, 6, 3, 2, 304, 18),
    Row(InvertedResidual, 6, 3, 1, 512, 5),
)
EFFICIENTNET_V2_L = (
    Row(FusedInvertedResidual, 1, 3, 1, 32, 4),
    Row(FusedInvertedResidual, 4, 3, 2, 64, 7),
    Row(FusedInvertedResidual, 4, 3, 2, 96, 7),
    Row(InvertedResidual, 4, 3, 2, 192, 10),
    Row(InvertedResidual, 6, 3, 1, 224, 19),
    Row(InvertedResidual, 6, 3, 2, 384, 25),
    Row(InvertedResidual, 6, 3, 1, 640, 7),
)


def _round_channels(channels: float) -> int:
    """Return the nearest multiple of 8 that is at least nine tenths of `channels`, as in the papers' code."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def _v1_blocks() -> Iterator[Block]:
    in_channels = 32
    for out_channels, stride in MOBILENET_V1:
        yield Block(SeparableConv, in_channels, in_channels, out_channels, 3, stride, relu6)
        in_channels = out_channels


def _v3_blocks(rows: Sequence[tuple[int, int, int, bool, Callable[[], nn.Module], int]]) -> Iterator[Block]:
    in_channels = 16
    for kernel_size, inner, out_channels, gated, activation, stride in rows:
        gate = partial(SqueezeExcite, hidden=_round_channels(inner // 4), gate=nn.Hardsigmoid) if gated else None
        yield Block(InvertedResidual, in_channels, inner, out_channels, kernel_size, stride, activation, gate)
        in_channels = out_channels


def _row_blocks(rows: Sequence[Row], in_channels: int, *, width: float = 1.0, depth: float = 1.0) -> Iterator[Block]:
    for row in rows:
        out_channels = _round_channels(row.out_channels * width)
        for position in range(math.ceil(row.depth * depth)):
            inner, stride = _round_channels(in_channels * row.expansion), row.stride if position == 0 else 1
            yield Block(row.block, in_channels, inner, out_channels, row.kernel_size, stride, relu6)
            in_channels = out_channels


def _scale(rows: Sequence[Row], settings: Settings, *, stem: int = 32, width: float = 1, depth: float = 1) -> Variant:
    stem, last = _round_channels(stem * width), 4 * _round_channels(1280 / 4 * width)
    blocks = []
    for block in _row_blocks(rows, stem, width=width, depth=depth):
        squeezed = max(1, block.in_channels // 4)  # from the narrow end; MobileNetV3 takes the wide one
        blocks.append(block._replace(activation=silu, gate=partial(SqueezeExcite, hidden=squeezed, activation=silu)))
    return Variant(stem, tuple(blocks), last, 0, silu, settings)


# Momentum is Howard et al. 2019, section 6.1.1 ("decay 0.99"); dropout and eps are torchvision's. The paper's "dropout
# of 0.8" is the share kept in the authors' code.
V3 = Settings(dropout=0.2, norm_eps=1e-3, norm_momentum=0.01)
MOBILENETS = {
    "mobilenet_v1": Variant(32, tuple(_v1_blocks()), 0, 0, relu6, Settings()),
    "mobilenet_v2": Variant(32, tuple(_row_blocks(MOBILENET_V2, 32)), 1280, 0, relu6, Settings(dropout=0.2)),
    "mobilenet_v3_small": Variant(16, tuple(_v3_blocks(MOBILENET_V3_SMALL)), 576, 1024, hardswish, V3),
    "mobilenet_v3_large": Variant(16, tuple(_v3_blocks(MOBILENET_V3_LARGE)), 960, 1280, hardswish, V3),
}
# Tan & Le 2019, section 5.2: dropout rises from 0.2 to 0.5. Image sizes and norm constants are torchvision's.
B0 = Settings(dropout=0.2, stochastic_depth=0.2)
B5 = B0._replace(norm_eps=1e-3, norm_momentum=0.01)
V2 = B0._replace(norm_eps=1e-3)
EFFICIENTNETS = {
    "efficientnet_b0": _scale(EFFICIENTNET_B0, B0),
    "efficientnet_b1": _scale(EFFICIENTNET_B0, B0._replace(image_size=240), depth=1.1),
    "efficientnet_b2": _scale(EFFICIENTNET_B0, B0._replace(image_size=288, dropout=0.3), width=1.1, depth=1.2),
    "efficientnet_b3": _scale(EFFICIENTNET_B0, B0._replace(image_size=300, dropout=0.3), width=1.2, depth=1.4),
    "efficientnet_b4": _scale(EFFICIENTNET_B0, B0._replace(image_size=380, dropout=0.4), width=1.4, depth=1.8),
    "efficientnet_b5": _scale(EFFICIENTNET_B0, B5._replace(image_size=456, dropout=0.4), width=1.6, depth=2.2),
    "efficientnet_b6": _scale(EFFICIENTNET_B0, B5._replace(image_size=528, dropout=0.5), width=1.8, depth=2.6),
    "efficientnet_b7": _scale(EFFICIENTNET_B0, B5._replace(image_size=600, dropout=0.5), width=2.0, depth=3.1),
    "efficientnet_v2_s": _scale(EFFICIENTNET_V2_S, V2._replace(image_size=384), stem=24),
    "efficientnet_v2_m": _scale(EFFICIENTNET_V2_M, V2._replace(image_size=480, dropout=0.3), stem=24),
    "efficientnet_v2_l": _scale(EFFICIENTNET_V2_L, V2._replace(image_size=480, dropout=0.4)),
}


def _stages(blocks: Sequence[Block], *, small: bool) -> dict[str, nn.Module]:
    """Return the blocks by resolution: each stride starts a stage. For small images the first stride is left out."""
    strides = [block.stride for block in blocks]
    early = strides.index(2) if small else None
    grouped: list[list[nn.Module]] = []
    for position, block in enumerate(blocks):
        if block.stride > 1 or position == 0:
            grouped.append([])
        built = block._replace(stride=1) if position == early else block
        grouped[-1].append(built.kind(built))
    return {f"stage{number}": nn.Sequential(*group) for number, group in enumerate(grouped, start=1)}


def _build(variant: Variant, settings: Settings, *, options: Options) -> ConvNet:
    features, activation = variant.blocks[-1].out_channels, variant.activation
    head = nn.Sequential()
    if variant.last:
        head.append(conv_norm(features, variant.last, kernel_size=1, activation=activation))
        features = variant.last
    between: dict[str, nn.Module] = {}
    if variant.hidden:  # figure 5 of Howard et al. 2019
        between = {"hidden": nn.Linear(features, variant.hidden), "activation": activation()}
        features = variant.hidden
    head.append(PooledLinear(features, settings.num_classes, dropout=settings.dropout, between=between))
    stride = 1 if settings.small else 2
    stem = conv_norm(settings.in_channels, variant.stem, kernel_size=3, stride=stride, activation=activation)
    stages = _stages(variant.blocks, small=settings.small)
    return apply_options(ConvNet(stem, stages, head=head), settings, options=options)


def mobilenet(variant: str = "mobilenet_v2", **options: Unpack[Options]) -> ConvNet:
    """Build a MobileNet: v1 equal to timm's `mobilenetv1_100`, others to torchvision's; H and W at least 1."""
    table = find_variant(variant, MOBILENETS)
    return _build(table, resolve_options(table.settings, options), options=options)


def efficientnet(variant: str = "efficientnet_b0", **options: Unpack[Options]) -> ConvNet:
    """Build an EfficientNet B0 to B7 or V2 S, M, L, equal to torchvision's; H and W at least 1."""
    table = find_variant(variant, EFFICIENTNETS)
    settings = resolve_options(table.settings, options)
    # Block i of L, counted from 0, has i / L of the rate: the last one less than the full rate.
    rate = settings.stochastic_depth * (1 - 1 / len(table.blocks))
    return _build(table, settings._replace(stochastic_depth=rate), options=options)
