"""LeNet, AlexNet and VGG: a sequence of convolutions and poolings, then fully connected layers.

LeCun, Bottou, Bengio & Haffner 1998, "Gradient-based learning applied to document recognition", section II.B
Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks": AlexNet in one column, where
    Krizhevsky, Sutskever & Hinton 2012 have two
Simonyan & Zisserman 2015, "Very deep convolutional networks for large-scale image recognition", table 1
"""

from typing import NamedTuple, Unpack

from torch import nn

from models.arguments import require
from models.equations.layers import with_reference_ops
from models.layers import ConvNet, relu
from models.options import Options, Settings, apply_options, find_variant, resolve_options


class Vgg(NamedTuple):
    """A column of table 1: number of convolutions before each of the five poolings."""

    depths: tuple[int, int, int, int, int]
    batch_norm: bool = False  # not in the paper, which precedes it; torchvision's `_bn`


# Feature maps of C1, C3 and C5 and units of F6: figure 2 of LeCun et al.
LENETS = {"lenet5": (6, 16, 120, 84)}
# Filters and kernel sizes. The paper's fourth convolution has 384 filters; torchvision's published weights have 256.
ALEXNETS = {"alexnet": ((64, 192, 384, 256, 256), (11, 5, 3, 3, 3))}
VGGS = {
    "vgg11": Vgg((1, 1, 2, 2, 2)),
    "vgg13": Vgg((2, 2, 2, 2, 2)),
    "vgg16": Vgg((2, 2, 3, 3, 3)),
    "vgg19": Vgg((2, 2, 4, 4, 4)),
}
VGGS |= {f"{name}_bn": column._replace(batch_norm=True) for name, column in VGGS.items()}
VGG_WIDTHS = (64, 128, 256, 512, 512)
HIDDEN = 4096  # units of each fully connected layer of AlexNet and VGG


class FullyConnected(nn.Sequential):
    """Two hidden layers and a linear layer: 59 of AlexNet's 61 million parameters, 124 of VGG-16's 138.

    `dropouts` are the rates before each of the three. Shapes: (N, C, H, W) -> (N, K), any H and W.
    """

    def __init__(self, in_channels: int, num_classes: int, *, side: int, dropouts: tuple[float, float, float]) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(side)  # (N, C, H, W) -> (N, C, side, side), 6 in AlexNet, 7 in VGG
        self.flatten = nn.Flatten()  # -> (N, C side side)
        self.dropout1 = nn.Dropout(dropouts[0])
        self.linear1 = nn.Linear(in_channels * side * side, HIDDEN)  # -> (N, 4096)
        self.relu1 = relu()
        self.dropout2 = nn.Dropout(dropouts[1])
        self.linear2 = nn.Linear(HIDDEN, HIDDEN)
        self.relu2 = relu()
        self.dropout3 = nn.Dropout(dropouts[2])
        self.linear3 = nn.Linear(HIDDEN, num_classes)  # -> (N, K)


def lenet(variant: str = "lenet5", *, ops: str = "torch", **options: Unpack[Options]) -> ConvNet:
    """Build LeNet-5 for images of 28 or 32 pixels.

    Modernised: ReLU for the scaled tanh, max pooling for averages with a trained scale and shift, C3 connected to all
    maps of S2 instead of table I, and a linear layer for the distances to drawn letters. 61,706 parameters with one
    channel and ten classes. `ops` is "torch", or "reference" for the equations of `models.equations`.
    """
    c1, c3, c5, f6 = find_variant(variant, LENETS)
    require(ops in ("torch", "reference"), "is not one of torch, reference: leave it out for torch's", ops=ops)
    settings = resolve_options(Settings(num_classes=10, image_size=32), options)
    # MNIST's images, and the paper's padded ones.
    require(settings.image_size in (28, 32), "must be 28 or 32 pixels for LeNet-5", image_size=settings.image_size)
    padding = (32 - settings.image_size) // 2
    stem = nn.Sequential(nn.Conv2d(settings.in_channels, c1, 5, padding=padding), relu())  # -> (N, 6, 28, 28)
    stages = {
        "stage1": nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(c1, c3, 5), relu()),  # -> (N, 16, 10, 10)
        "stage2": nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(c3, c5, 5), relu()),  # -> (N, 120, 1, 1)
    }
    hidden = nn.Sequential(nn.Linear(c5, f6), relu())
    head = nn.Sequential(nn.Flatten(), hidden, nn.Dropout(settings.dropout), nn.Linear(f6, settings.num_classes))
    net = apply_options(ConvNet(stem, stages, head=head), settings, options=options)
    return net if ops == "torch" else with_reference_ops(net)


def alexnet(variant: str = "alexnet", **options: Unpack[Options]) -> ConvNet:
    """Build AlexNet in one column and without local response normalisation, equal to torchvision's.

    Takes H and W of at least 63. Up to 64 pixels: a 3x3 stem at stride 1, features averaged to 1x1, at least 7.
    """
    widths, kernels = find_variant(variant, ALEXNETS)
    settings = resolve_options(Settings(dropout=0.5), options, at_least=7)

    def conv(position: int) -> list[nn.Module]:
        before, width, size = widths[position - 1], widths[position], kernels[position]
        return [nn.Conv2d(before, width, size, padding=size // 2), relu()]

    if settings.small:
        stem = nn.Sequential(nn.Conv2d(settings.in_channels, widths[0], 3, padding=1), relu())
    else:
        first = nn.Conv2d(settings.in_channels, widths[0], kernels[0], stride=4, padding=2)
        stem = nn.Sequential(first, relu(), nn.MaxPool2d(3, stride=2))  # 224 -> 55 -> 27
    stages = {
        "stage1": nn.Sequential(*conv(1), nn.MaxPool2d(3, stride=2)),  # -> (N, 192, 13, 13)
        "stage2": nn.Sequential(*conv(2), *conv(3), *conv(4), nn.MaxPool2d(3, stride=2)),  # -> (N, 256, 6, 6)
    }
    dropouts = (settings.dropout, settings.dropout, 0.0)
    head = FullyConnected(widths[-1], settings.num_classes, side=1 if settings.small else 6, dropouts=dropouts)
    return apply_options(ConvNet(stem, stages, head=head), settings, options=options)


def vgg(variant: str = "vgg16", **options: Unpack[Options]) -> ConvNet:
    """Build a VGG with 11 to 19 layers, with or without batch norm (`_bn`), equal to torchvision's of the same name.

    Takes H and W of at least 32. Up to 64 pixels: no pooling after stage 1, features averaged to 1x1, at least 16.
    """
    table = find_variant(variant, VGGS)
    settings = resolve_options(Settings(dropout=0.5), options, at_least=16)
    in_channels = settings.in_channels
    stages: dict[str, nn.Module] = {}
    for number, (width, depth) in enumerate(zip(VGG_WIDTHS, table.depths, strict=True), start=1):
        stage = stages[f"stage{number}"] = nn.Sequential()
        for _ in range(depth):
            norm = [nn.BatchNorm2d(width)] if table.batch_norm else []
            stage.extend([nn.Conv2d(in_channels, width, 3, padding=1), *norm, relu()])
            in_channels = width
        if number > 1 or not settings.small:
            stage.append(nn.MaxPool2d(2))
    dropouts = (0.0, settings.dropout, settings.dropout)
    head = FullyConnected(in_channels, settings.num_classes, side=1 if settings.small else 7, dropouts=dropouts)
    return apply_options(ConvNet(nn.Identity(), stages, head=head), settings, options=options)
