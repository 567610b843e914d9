"""Networks that tests train: small, and without what makes a rank's result depend on its share of the batch."""

from __future__ import annotations

from torch import nn

from models.layers import ConvNet, PooledLinear


def plain(variant: str = "plain", *, num_classes: int, in_channels: int = 3, image_size: int = 16) -> ConvNet:
    """Three convolutions without a norm. Shapes: (N, in_channels, H, W) -> (N, num_classes)."""
    stem = nn.Sequential(nn.Conv2d(in_channels, 16, 3, padding=1), nn.ReLU())
    stages = {
        "stage1": nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        "stage2": nn.Sequential(nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU()),
    }
    return ConvNet(stem, stages, head=PooledLinear(32, num_classes))
