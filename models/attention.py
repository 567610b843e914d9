"""ConvNeXt and CoAtNet: what transformers brought, with convolutions alone and beside attention.

Liu, Mao, Wu, Feichtenhofer, Darrell & Xie 2022, "A ConvNet for the 2020s", section 3
Dai, Liu, Le & Tan 2021, "CoAtNet: marrying convolution and attention for all data sizes", table 3
"""

from __future__ import annotations

import math
from typing import NamedTuple, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.layers import ConvNet, LayerNorm2d, PooledLinear, SqueezeExcite, StochasticDepth, conv_norm
from models.options import Options, Settings, find, finish, settle

LAYER_NORM_EPS = 1e-6  # of ConvNeXt's published code, and of timm's CoAtNet
HEAD_WIDTH = 32  # channels of an attention head: Dai et al. table 3
EXPANSION = 4  # of every block here, from its output's channels
TABLE = ".bias.table"  # how the names of relative attention's tables end
LAYER_SCALE = 1e-6  # Liu et al. table 5


class Convnext(NamedTuple):
    """Widths and depths as section 3 of Liu et al. lists them, and the stochastic depth of table 5."""

    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    stochastic_depth: float


class Coatnet(NamedTuple):
    """A column of table 3 of Dai et al., S0 to S4: S0 is the stem's two convolutions; stochastic depth of table 10."""

    widths: tuple[int, int, int, int, int]
    depths: tuple[int, int, int, int, int]
    stochastic_depth: float


CONVNEXTS = {
    "convnext_tiny": Convnext((96, 192, 384, 768), (3, 3, 9, 3), 0.1),
    "convnext_small": Convnext((96, 192, 384, 768), (3, 3, 27, 3), 0.4),
    "convnext_base": Convnext((128, 256, 512, 1024), (3, 3, 27, 3), 0.5),
    "convnext_large": Convnext((192, 384, 768, 1536), (3, 3, 27, 3), 0.5),
}
COATNETS = {
    "coatnet_0": Coatnet((64, 96, 192, 384, 768), (2, 2, 3, 5, 2), 0.2),
    "coatnet_1": Coatnet((64, 96, 192, 384, 768), (2, 2, 6, 14, 2), 0.3),
    "coatnet_2": Coatnet((128, 128, 256, 512, 1024), (2, 2, 6, 14, 2), 0.5),
    "coatnet_3": Coatnet((192, 192, 384, 768, 1536), (2, 2, 6, 14, 2), 0.7),
    # Trained on JFT first; table 10 has no column for it on ImageNet-1k alone, so the largest that has one stands in.
    "coatnet_4": Coatnet((192, 192, 384, 768, 1536), (2, 2, 12, 28, 2), 0.7),
}


class ConvNeXtBlock(nn.Module):
    """A 7x7 depthwise convolution, then a layer norm and two linear layers on each pixel: figure 4 of Liu et al.

    Shapes: (N, C, H, W) -> (N, C, H, W).
    """

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


class Downsample(nn.Module):
    """The shortcut of a block that changes the shape: a pooling over 2x2, a 1x1 to other channels.

    Equations 4 and 5 of Dai et al., but with averages for their maxima, as in timm, whose weights
    fit. An odd last row or column is averaged alone: the strided convolution beside it reads it too.

    Shapes: (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity()
        self.expand = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.expand(self.pool(x))
        return changed


class MBConv(nn.Module):
    """An inverted residual with a squeeze-excite gate, its norm in front: Dai et al. section 2.1 and A.1.

    The stride sits on the depthwise convolution, the better place by their table 9.

    Shapes: (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

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
        wide = self.depthwise(self.expand(self.norm(x)))  # (N, 4 out_channels, H / stride, W / stride)
        residual: Tensor = self.stochastic_depth(self.project(self.gate(wide)))  # (N, out_channels, ...)
        shortcut: Tensor = self.shortcut(x)
        return residual + shortcut


def resize_table(table: Tensor, height: int, *, width: int) -> Tensor:
    """A table of biases for maps of height x width pixels, by bilinear interpolation: Dai et al. section A.1.

    Shapes: ((2 side - 1)^2, A) -> ((2 height - 1) (2 width - 1), A).
    """
    full = math.isqrt(len(table))
    square = table.T.reshape(1, -1, full, full).float()  # (1, A, 2 side - 1, 2 side - 1)
    resized = functional.interpolate(square, (2 * height - 1, 2 * width - 1), mode="bilinear")
    return resized[0].flatten(1).T.to(table.dtype)


class RelativeBias(nn.Module):
    """A learned number for each head and each offset between two pixels: w of equation 3 of Dai et al., section A.1.

    The table of (2 side - 1)^2 offsets x A heads is for maps of side x side pixels; for others it is resized.

    Shapes: height and width -> (A, L, L), L = height width.
    """

    def __init__(self, num_heads: int, *, side: int) -> None:
        super().__init__()
        self.side = side
        self.table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, num_heads))

    def forward(self, height: int, width: int) -> Tensor:
        table: Tensor = self.table
        if (height, width) != (self.side, self.side):
            table = resize_table(table, height, width=width)
        rows = table.T.reshape(-1, 2 * height - 1, 2 * width - 1)  # (A, 2 height - 1, 2 width - 1)
        # The window that begins at (y, x) holds the offsets from pixel (y, x) to all others, the last pixel first.
        windows = rows.unfold(1, height, 1).unfold(2, width, 1)  # (A, height, width, height, width), a view
        return windows.flip(3, 4).reshape(-1, height * width, height * width)


class RelativeAttention(nn.Module):
    """Self-attention over all pixels with a bias for the offset between two: equation 3 of Dai et al.

    Shapes: (N, H, W, in_channels) -> (N, H, W, out_channels), L = H W tokens, A heads of width D = 32.
    """

    def __init__(self, in_channels: int, out_channels: int, *, side: int) -> None:
        super().__init__()
        self.num_heads = out_channels // HEAD_WIDTH
        self.qkv = nn.Linear(in_channels, 3 * out_channels)
        self.bias = RelativeBias(self.num_heads, side=side)
        self.project = nn.Linear(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        num_images, height, width, _ = x.shape
        parts = self.qkv(x).view(num_images, height * width, self.num_heads, 3 * HEAD_WIDTH)  # (N, L, A, 3 D)
        query, key, value = parts.transpose(1, 2).chunk(3, dim=-1)  # (N, A, L, D) each
        bias = self.bias(height, width).to(query.dtype)  # (A, L, L)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)  # (N, A, L, D)
        projected: Tensor = self.project(mixed.transpose(1, 2).flatten(2))  # (N, L, out_channels)
        return projected.view(num_images, height, width, -1)


class TransformerBlock(nn.Module):
    """Relative attention over all pixels, then two linear layers on each, both with a norm in front: Dai et al. A.1.

    Shapes: (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

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
        pooled = self.pool(normed).permute(0, 2, 3, 1)  # -> (N, H / stride, W / stride, in_channels)
        shortcut: Tensor = self.shortcut(x).permute(0, 2, 3, 1)  # -> (N, H / stride, W / stride, out_channels)
        pixels: Tensor = shortcut + self.stochastic_depth(self.attention(pooled))
        mixed = self.project(self.activation(self.expand(self.norm2(pixels))))  # (N, ..., out_channels)
        pixels = pixels + self.stochastic_depth(mixed)
        return pixels.permute(0, 3, 1, 2)  # -> (N, out_channels, H / stride, W / stride)


def convnext(variant: str = "convnext_tiny", **options: Unpack[Options]) -> ConvNet:
    """A ConvNeXt from tiny to large, equal to torchvision's of the same name.

    Images of 64 pixels and less: a 3x3 kernel at stride 1 for the patches of 4x4.

    Shapes: (N, in_channels, H, W) -> (N, num_classes), H and W at least 32, of the small one 8.
    Raises: ValueError for an unknown variant, smaller images, fewer than two classes.
    """
    table = find(variant, CONVNEXTS)
    settings = settle(Settings(stochastic_depth=table.stochastic_depth), options, at_least=8)
    channels = table.widths[0]
    patches = nn.Conv2d(settings.in_channels, channels, 4, stride=4)
    if settings.small:
        patches = nn.Conv2d(settings.in_channels, channels, 3, padding=1)
    stages: dict[str, nn.Module] = {}
    for number, (width, depth) in enumerate(zip(table.widths, table.depths, strict=True), start=1):
        stage = nn.Sequential()
        if number > 1:
            halve = nn.Conv2d(channels, width, 2, stride=2)
            stage.append(nn.Sequential(LayerNorm2d(channels, eps=LAYER_NORM_EPS), halve))
        stage.extend(ConvNeXtBlock(width) for _ in range(depth))
        stages[f"stage{number}"], channels = stage, width
    stem = nn.Sequential(patches, LayerNorm2d(table.widths[0], eps=LAYER_NORM_EPS))
    between = {"norm": nn.LayerNorm(channels, eps=LAYER_NORM_EPS)}
    head = PooledLinear(channels, settings.num_classes, dropout=settings.dropout, between=between)
    return finish(ConvNet(stem, stages, head=head), settings, options=options)


def coatnet(variant: str = "coatnet_0", **options: Unpack[Options]) -> ConvNet:
    """A CoAtNet from 0 to 4, equal to timm's `coatnet_0_224` to `coatnet_4_224`.

    Images of 64 pixels and less: no stride in the stem and the first stage. The attention
    of stages 3 and 4 sees the whole image.

    Shapes: (N, in_channels, H, W) -> (N, num_classes), H and W at least 1.
    Raises: ValueError for an unknown variant or fewer than two classes.
    """
    table = find(variant, COATNETS)
    settings = settle(Settings(stochastic_depth=table.stochastic_depth), options)
    channels = table.widths[0]
    side = settings.image_size if settings.small else math.ceil(settings.image_size / 2)
    stem = nn.Sequential(
        conv_norm(settings.in_channels, channels, kernel_size=3, stride=1 if settings.small else 2, activation=nn.GELU),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
    )
    stages: dict[str, nn.Module] = {}
    for number, (width, depth) in enumerate(zip(table.widths[1:], table.depths[1:], strict=True), start=1):
        stage = nn.Sequential()
        for position in range(depth):
            stride = 1 if position > 0 or (settings.small and number == 1) else 2
            side = math.ceil(side / stride)
            if number <= 2:
                stage.append(MBConv(channels, width, stride=stride))
            else:
                stage.append(TransformerBlock(channels, width, stride=stride, side=side))
            channels = width
        stages[f"stage{number}"] = stage
    norm, hidden = nn.LayerNorm(channels, eps=LAYER_NORM_EPS), nn.Linear(channels, channels)  # timm's, not the paper's
    between = {"norm": norm, "hidden": hidden, "activation": nn.Tanh()}
    head = PooledLinear(channels, settings.num_classes, dropout=settings.dropout, between=between)
    return finish(ConvNet(stem, stages, head=head), settings, options=options)
