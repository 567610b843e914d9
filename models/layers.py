"""The parts every network is built from, and the shape they all share: stem, stages, head.

Parts keep their layers in the order of torchvision's modules, so that published
weights fit parameter by parameter.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class ConvNet(nn.Module):
    """A network as head(stages(stem(images))); every architecture of this project is one.

    `stages` run in the order given. Each is named, and each ends where the
    resolution changes, so a report can speak of a network stage by stage.

    Shapes: (N, C, H, W) -> (N, K), K classes.
    """

    def __init__(self, stem: nn.Module, stages: Mapping[str, nn.Module], *, head: nn.Module) -> None:
        super().__init__()
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

    Shapes: (N, C, H, W) -> (N, K), any H and W.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)  # (N, C, H, W) -> (N, C, 1, 1)
        self.flatten = nn.Flatten()  # -> (N, C)
        self.linear = nn.Linear(in_channels, num_classes)  # -> (N, K)


def conv_norm(
    in_channels: int, out_channels: int, *, kernel_size: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """A convolution that keeps H and W at stride 1, and its batch norm; the norm's shift makes a bias superfluous.

    Shapes: (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)), odd kernels.
    """
    return nn.Sequential(
        nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=False,
        ),
        nn.BatchNorm2d(out_channels),
    )


def check_classes(num_classes: int) -> int:
    """Return `num_classes`, or raise ValueError: a classifier needs two classes to tell apart."""
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: a classifier needs at least 2 classes")
    return num_classes
