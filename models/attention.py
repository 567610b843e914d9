"""ConvNeXt and CoAtNet: the design of transformers, with convolutions alone and with attention.

Liu, Mao, Wu, Feichtenhofer, Darrell & Xie 2022, "A ConvNet for the 2020s", section 3
Dai, Liu, Le & Tan 2021, "CoAtNet: marrying convolution and attention for all data sizes", table 3
In shapes H' is ceil(H / stride), W' alike.
"""

import math
from functools import partial
from typing import NamedTuple, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.layers import ConvNet, LayerNorm2d, PooledLinear, ResidualBlock, SqueezeExcite, StochasticDepth, conv_norm
from models.options import Options, Settings, apply_options, find_variant, resolve_options

LAYER_NORM_EPS = 1e-6  # ConvNeXt's published code, timm's CoAtNet
HEAD_WIDTH = 32  # channels of an attention head: Dai et al. table 3
EXPANSION = 4  # of every block here, over its output channels
LAYER_SCALE = 1e-6  # Liu et al. table 5


class Variant(NamedTuple):
    """Widths and depths of the stages, and the stochastic depth of the last block."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    stochastic_depth: float


# Section 3 and table 5 of Liu et al.; the four smallest are timm's, which trains them without stochastic depth.
CONVNEXTS = {
    "convnext_atto": Variant((40, 80, 160, 320), (2, 2, 6, 2), 0.0),
    "convnext_femto": Variant((48, 96, 192, 384), (2, 2, 6, 2), 0.0),
    "convnext_pico": Variant((64, 128, 256, 512), (2, 2, 6, 2), 0.0),
    "convnext_nano": Variant((80, 160, 320, 640), (2, 2, 8, 2), 0.0),
    "convnext_tiny": Variant((96, 192, 384, 768), (3, 3, 9, 3), 0.1),
    "convnext_small": Variant((96, 192, 384, 768), (3, 3, 27, 3), 0.4),
    "convnext_base": Variant((128, 256, 512, 1024), (3, 3, 27, 3), 0.5),
    "convnext_large": Variant((192, 384, 768, 1536), (3, 3, 27, 3), 0.5),
}
# Tables 3 and 10 of Dai et al., S0 to S4, where S0 is the stem's two convolutions.
COATNETS = {
    "coatnet_mini": Variant((32, 48, 96, 192, 384), (2, 2, 3, 5, 2), 0.1),  # not published: coatnet_0, half as wide
    "coatnet_0": Variant((64, 96, 192, 384, 768), (2, 2, 3, 5, 2), 0.2),
    "coatnet_1": Variant((64, 96, 192, 384, 768), (2, 2, 6, 14, 2), 0.3),
    "coatnet_2": Variant((128, 128, 256, 512, 1024), (2, 2, 6, 14, 2), 0.5),
    "coatnet_3": Variant((192, 192, 384, 768, 1536), (2, 2, 6, 14, 2), 0.7),
    # Pretrained on JFT: table 10 has no ImageNet-1k column for it, so this is the rate of coatnet_3.
    "coatnet_4": Variant((192, 192, 384, 768, 1536), (2, 2, 12, 28, 2), 0.7),
}


class ConvNeXtBlock(ResidualBlock):
    """7x7 depthwise, layer norm, two linear layers: figure 4 of Liu et al. Shapes: (N, C, H, W) -> (N, C, H, W)."""

    last_norm = None
    no_decay = ()  # in the published code depthwise kernels decay

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer_scale = nn.Parameter(torch.full((channels,), LAYER_SCALE))
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.expand = nn.Linear(channels, EXPANSION * channels)
        self.activation = nn.GELU()
        self.project = nn.Linear(EXPANSION * channels, channels)
        self.stochastic_depth = StochasticDepth()

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(self.depthwise(x).permute(0, 2, 3, 1))  # (N, C, H, W) -> (N, H, W, C)
        mixed = self.project(self.activation(self.expand(pixels))) * self.layer_scale  # (N, H, W, C)
        residual: Tensor = self.stochastic_depth(mixed.permute(0, 3, 1, 2))  # -> (N, C, H, W)
        return residual + x


class Downsample(nn.Sequential):
    """The shortcut of a block that changes the shape: average pooling over 2x2 and a 1x1 convolution.

    Equations 4 and 5 of Dai et al., with averages for their maxima as in timm. An odd last row or column is averaged
    alone: the parallel strided convolution reads it too. Shapes: (N, in_channels, H, W) -> (N, out_channels, H', W').
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity()
        self.expand = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()


class MBConv(ResidualBlock):
    """An inverted residual with pre-normalisation and a squeeze-excite gate: Dai et al. sections 2.1 and A.1.

    The depthwise layer strides, better by their table 9. Shapes: (N, in_channels, H, W) -> (N, out_channels, H', W').
    """

    last_norm = None  # it ends with a convolution
    no_decay = ()

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        inner = EXPANSION * out_channels
        self.shortcut = Downsample(in_channels, out_channels, stride=stride)
        self.norm = nn.BatchNorm2d(in_channels)
        self.expand = conv_norm(in_channels, inner, kernel_size=1, activation=nn.GELU)
        self.depthwise = conv_norm(inner, inner, kernel_size=3, stride=stride, groups=inner, activation=nn.GELU)
        self.gate = SqueezeExcite(inner, out_channels // 4, activation=nn.SiLU)
        self.project = nn.Conv2d(inner, out_channels, 1)
        self.stochastic_depth = StochasticDepth()

    def forward(self, x: Tensor) -> Tensor:
        wide = self.depthwise(self.expand(self.norm(x)))  # (N, 4 out_channels, H', W')
        residual = self.stochastic_depth(self.project(self.gate(wide)))  # (N, out_channels, H', W')
        added: Tensor = residual + self.shortcut(x)
        return added


def resize_table(table: Tensor, height: int, *, width: int) -> Tensor:
    """Interpolate bilinearly, as Dai et al. A.1. Shapes: ((2 side - 1)^2, A) -> ((2 height - 1) (2 width - 1), A)."""
    full = math.isqrt(len(table))
    square = table.T.reshape(1, -1, full, full).float()  # (1, A, 2 side - 1, 2 side - 1)
    resized = functional.interpolate(square, (2 * height - 1, 2 * width - 1), mode="bilinear")
    return resized[0].flatten(1).T.to(table.dtype)


class RelativeBias(nn.Module):
    """A learned bias for each head and each offset between two pixels: w of equation 3 of Dai et al., section A.1.

    The table of (2 side - 1)^2 offsets x A heads is for maps of side x side pixels and is resized for others. Like
    other biases it has no weight decay. Shapes: height and width -> (A, L, L), L = height width.
    """

    no_decay = ("table",)

    def __init__(self, num_heads: int, *, side: int) -> None:
        super().__init__()
        self.side = side
        self.table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, num_heads))

    def forward(self, height: int, width: int) -> Tensor:
        table: Tensor = self.table
        if (height, width) != (self.side, self.side):
            table = resize_table(table, height, width=width)
        rows = table.T.reshape(-1, 2 * height - 1, 2 * width - 1)  # (A, 2 height - 1, 2 width - 1)
        # The patch at (y, x) holds the offsets from pixel (y, x) to all others, the last pixel first.
        patches = rows.unfold(1, height, 1).unfold(2, width, 1)  # (A, height, width, height, width), a view
        return patches.flip(3, 4).reshape(-1, height * width, height * width)


class RelativeAttention(nn.Module):
    """Attention with a bias per offset: Dai et al. (3). Shapes: (N, H, W, in_channels) -> (N, H, W, out_channels)."""

    def __init__(self, in_channels: int, out_channels: int, *, side: int) -> None:
        super().__init__()
        self.num_heads = out_channels // HEAD_WIDTH
        self.qkv = nn.Linear(in_channels, 3 * out_channels)
        self.bias = RelativeBias(self.num_heads, side=side)
        self.project = nn.Linear(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        num_images, height, width, _ = x.shape
        # L = H W tokens, A heads of width D
        parts = self.qkv(x).view(num_images, height * width, self.num_heads, 3 * HEAD_WIDTH)  # (N, L, A, 3 D)
        query, key, value = parts.transpose(1, 2).chunk(3, dim=-1)  # (N, A, L, D) each
        bias = self.bias(height, width).to(query.dtype)  # (A, L, L)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)  # (N, A, L, D)
        projected: Tensor = self.project(mixed.transpose(1, 2).flatten(2))  # (N, L, out_channels)
        return projected.view(num_images, height, width, -1)


class TransformerBlock(ResidualBlock):
    """Attention, two linear layers: Dai et al. A.1. Shapes: (N, in_channels, H, W) -> (N, out_channels, H', W')."""

    last_norm = None  # layer norms, before the layers
    no_decay = ()

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, side: int) -> None:
        super().__init__()
        self.shortcut = Downsample(in_channels, out_channels, stride=stride)
        self.norm1 = nn.LayerNorm(in_channels, eps=LAYER_NORM_EPS)
        self.pool = Downsample(in_channels, in_channels, stride=stride)
        self.attention = RelativeAttention(in_channels, out_channels, side=side)
        self.norm2 = nn.LayerNorm(out_channels, eps=LAYER_NORM_EPS)
        self.expand = nn.Linear(out_channels, EXPANSION * out_channels)
        self.activation = nn.GELU()
        self.project = nn.Linear(EXPANSION * out_channels, out_channels)
        self.stochastic_depth = StochasticDepth()

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (N, in_channels, H, W)
        pooled = self.pool(normed).permute(0, 2, 3, 1)  # -> (N, H', W', in_channels)
        shortcut: Tensor = self.shortcut(x).permute(0, 2, 3, 1)  # -> (N, H', W', out_channels)
        pixels: Tensor = shortcut + self.stochastic_depth(self.attention(pooled))
        mixed = self.project(self.activation(self.expand(self.norm2(pixels))))  # (N, H', W', out_channels)
        pixels = pixels + self.stochastic_depth(mixed)
        return pixels.permute(0, 3, 1, 2)  # -> (N, out_channels, H', W')


def convnext(variant: str = "convnext_tiny", **options: Unpack[Options]) -> ConvNet:
    """Build a ConvNeXt, equal to torchvision's; H, W at least 32. Up to 64 pixels: a 3x3 stem, stride 1, at least 8."""
    table = find_variant(variant, CONVNEXTS)
    settings = resolve_options(Settings(stochastic_depth=table.stochastic_depth), options, at_least=8)
    channels = table.widths[0]
    patches = nn.Conv2d(settings.in_channels, channels, 4, stride=4)
    if settings.small:
        patches = nn.Conv2d(settings.in_channels, channels, 3, padding=1)
    stages: dict[str, nn.Module] = {}
    for number, (width, depth) in enumerate(zip(table.widths, table.depths, strict=True), start=1):
        stage = stages[f"stage{number}"] = nn.Sequential()
        if number > 1:
            halve = nn.Conv2d(channels, width, 2, stride=2)
            stage.append(nn.Sequential(LayerNorm2d(channels, eps=LAYER_NORM_EPS), halve))
        stage.extend(ConvNeXtBlock(width) for _ in range(depth))
        channels = width
    stem = nn.Sequential(patches, LayerNorm2d(table.widths[0], eps=LAYER_NORM_EPS))
    between = {"norm": nn.LayerNorm(channels, eps=LAYER_NORM_EPS)}
    head = PooledLinear(channels, settings.num_classes, dropout=settings.dropout, between=between)
    return apply_options(ConvNet(stem, stages, head=head), settings, options=options)


def coatnet(variant: str = "coatnet_0", **options: Unpack[Options]) -> ConvNet:
    """Build a CoAtNet, equal to timm's `coatnet_0_224` etc. Up to 64 pixels: no stride in the stem and stage 1."""
    table = find_variant(variant, COATNETS)
    settings = resolve_options(Settings(stochastic_depth=table.stochastic_depth), options)
    channels = table.widths[0]
    side = settings.image_size if settings.small else math.ceil(settings.image_size / 2)
    stem = nn.Sequential(
        conv_norm(settings.in_channels, channels, kernel_size=3, stride=1 if settings.small else 2, activation=nn.GELU),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
    )
    stages: dict[str, nn.Module] = {}
    for number, (width, depth) in enumerate(zip(table.widths[1:], table.depths[1:], strict=True), start=1):
        stage = stages[f"stage{number}"] = nn.Sequential()
        for position in range(depth):
            stride = 1 if position > 0 or (settings.small and number == 1) else 2
            side = math.ceil(side / stride)
            block = MBConv if number <= 2 else partial(TransformerBlock, side=side)
            stage.append(block(channels, width, stride=stride))
            channels = width
    norm, hidden = nn.LayerNorm(channels, eps=LAYER_NORM_EPS), nn.Linear(channels, channels)  # timm's, not the paper's
    between = {"norm": norm, "hidden": hidden, "activation": nn.Tanh()}
    head = PooledLinear(channels, settings.num_classes, dropout=settings.dropout, between=between)
    return apply_options(ConvNet(stem, stages, head=head), settings, options=options)
