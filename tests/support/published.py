"""Published parameter counts and costs, one row per variant.

Multiply-adds, in billions, are those of convolutions, linear layers and the products of attention at the row's image
size, without norms, activations and biases. torchvision publishes them with its weights (`_ops`); timm's, for CoAtNet
and MobileNetV1, follow other rules and differ by up to 2 %.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """One variant. `architecture` is the name of a file in conf/model."""

    architecture: str
    variant: str
    parameters: int
    gmacs: float
    image_size: int
    source: str
    num_classes: int = 1000
    in_channels: int = 3


TV = "torchvision 0.29, weights' meta"
TIMM = "timm 1.0"
HALVED = "timm's coatnet_0 of half the width"
PUBLISHED = (
    Published("lenet", "lenet5", 61_706, 0.000417, 32, "LeCun et al. 1998, full C3", num_classes=10, in_channels=1),
    Published("alexnet", "alexnet", 61_100_840, 0.714, 224, TV),
    Published("vgg", "vgg11", 132_863_336, 7.609, 224, TV),
    Published("vgg", "vgg11_bn", 132_868_840, 7.609, 224, TV),
    Published("vgg", "vgg13", 133_047_848, 11.308, 224, TV),
    Published("vgg", "vgg13_bn", 133_053_736, 11.308, 224, TV),
    Published("vgg", "vgg16", 138_357_544, 15.470, 224, TV),
    Published("vgg", "vgg16_bn", 138_365_992, 15.470, 224, TV),
    Published("vgg", "vgg19", 143_667_240, 19.632, 224, TV),
    Published("vgg", "vgg19_bn", 143_678_248, 19.632, 224, TV),
    Published("resnet", "resnet18", 11_689_512, 1.814, 224, TV),
    Published("resnet", "resnet34", 21_797_672, 3.664, 224, TV),
    Published("resnet", "resnet50", 25_557_032, 4.089, 224, TV),
    Published("resnet", "resnet101", 44_549_160, 7.801, 224, TV),
    Published("resnet", "resnet152", 60_192_808, 11.514, 224, TV),
    Published("resnet", "wide_resnet50_2", 68_883_240, 11.398, 224, TV),
    Published("resnet", "wide_resnet101_2", 126_886_696, 22.753, 224, TV),
    Published("resnext", "resnext50_32x4d", 25_028_904, 4.230, 224, TV),
    Published("resnext", "resnext101_32x8d", 88_791_336, 16.414, 224, TV),
    Published("resnext", "resnext101_64x4d", 83_455_272, 15.460, 224, TV),
    Published("mobilenet", "mobilenet_v1", 4_231_976, 0.58, 224, TIMM),
    Published("mobilenet", "mobilenet_v2", 3_504_872, 0.301, 224, TV),
    Published("mobilenet", "mobilenet_v3_small", 2_542_856, 0.057, 224, TV),
    Published("mobilenet", "mobilenet_v3_large", 5_483_032, 0.217, 224, TV),
    Published("efficientnet", "efficientnet_b0", 5_288_548, 0.386, 224, TV),
    Published("efficientnet", "efficientnet_b1", 7_794_184, 0.687, 240, TV),
    Published("efficientnet", "efficientnet_b2", 9_109_994, 1.088, 288, TV),
    Published("efficientnet", "efficientnet_b3", 12_233_232, 1.827, 300, TV),
    Published("efficientnet", "efficientnet_b4", 19_341_616, 4.394, 380, TV),
    Published("efficientnet", "efficientnet_b5", 30_389_784, 10.266, 456, TV),
    Published("efficientnet", "efficientnet_b6", 43_040_704, 19.068, 528, TV),
    Published("efficientnet", "efficientnet_b7", 66_347_960, 37.746, 600, TV),
    Published("efficientnet", "efficientnet_v2_s", 21_458_488, 8.366, 384, TV),
    Published("efficientnet", "efficientnet_v2_m", 54_139_356, 24.582, 480, TV),
    Published("efficientnet", "efficientnet_v2_l", 118_515_272, 56.080, 480, TV),
    Published("convnext", "convnext_atto", 3_695_520, 0.55, 224, TIMM),
    Published("convnext", "convnext_femto", 5_217_784, 0.79, 224, TIMM),
    Published("convnext", "convnext_pico", 9_045_672, 1.37, 224, TIMM),
    Published("convnext", "convnext_nano", 15_593_560, 2.46, 224, TIMM),
    Published("convnext", "convnext_tiny", 28_589_128, 4.456, 224, TV),
    Published("convnext", "convnext_small", 50_223_688, 8.684, 224, TV),
    Published("convnext", "convnext_base", 88_591_464, 15.355, 224, TV),
    Published("convnext", "convnext_large", 197_767_336, 34.361, 224, TV),
    Published("coatnet", "coatnet_mini", 6_488_574, 1.190, 224, HALVED),
    Published("coatnet", "coatnet_0", 25_036_820, 4.58, 224, TIMM),
    Published("coatnet", "coatnet_1", 42_225_776, 8.70, 224, TIMM),
    Published("coatnet", "coatnet_2", 74_684_744, 16.50, 224, TIMM),
    Published("coatnet", "coatnet_3", 166_966_264, 36.56, 224, TIMM),
    Published("coatnet", "coatnet_4", 275_425_288, 62.48, 224, TIMM),
)
# The variant of each architecture with the fewest parameters, which tests can afford to run.
SMALLEST = {row.architecture: row.variant for row in sorted(PUBLISHED, key=lambda row: row.parameters, reverse=True)}
