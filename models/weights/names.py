"""Publishers' tensor names, sorted into the order in which our networks register their tensors.

A file need not keep an order (safetensors sorts by name). Our order is torchvision's (timm's for CoAtNet and
MobileNetV1), so that sorted names match tensor by tensor.
"""

import re
from collections.abc import Callable, Collection
from typing import NamedTuple

LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class Layout(NamedTuple):
    """A publisher, and all parts of its names in the order of registration, separated by spaces."""

    name: str
    parts: str
    rename: Callable[[str, Collection[str]], str] = lambda name, names: name  # before sorting
    norm_eps: float | None = None  # of the published networks' batch norms, None if it is ours

    def knows(self, names: Collection[str]) -> bool:
        """Return whether every part of every name is a number or known."""
        known = {*self.parts.split(), *LEAVES}
        parts = {part for name in names for part in self.rename(name, names).split(".")}
        return all(part.isdigit() or part in known for part in parts)

    def sort(self, names: Collection[str]) -> list[str]:
        """Return the names in the publisher's order of registration."""
        ranks = {part: rank for rank, part in enumerate((*self.parts.split(), *LEAVES))}

        def place(name: str) -> list[tuple[int, int]]:
            parts = self.rename(name, names).split(".")
            return [(0, int(part)) if part.isdigit() else (1, ranks[part]) for part in parts]

        return sorted(names, key=place)


OURS = Layout("convoy", "")
UNKNOWN = Layout("unknown", "")
# The convolutions of timm's blocks, in order; `bn1` follows the first of them.
TIMM_BLOCKS = (("conv_pw", "conv_dw", "conv_pwl"), ("conv_exp", "conv_pwl"), ("conv_dw", "conv_pw"), ("conv",))


def _number_timm_block(name: str, names: Collection[str]) -> str:
    """Rename `blocks.1.0.bn2.weight` to `blocks.1.0.2.1.weight`, after the second convolution `2.0`; a gate is `.2`."""
    match = re.fullmatch(r"(blocks\.\d+\.\d+)\.(\w+)\.(.+)", name)
    if match is None:
        return name
    block, part, rest = match.groups()
    has = {conv for convs in TIMM_BLOCKS for conv in convs if f"{block}.{conv}.weight" in names}
    convs = next((convs for convs in TIMM_BLOCKS if has == set(convs)), ())
    if part in convs:
        return f"{block}.{convs.index(part) + 1}.0.{rest}"
    if part.startswith("bn"):
        return f"{block}.{part.removeprefix('bn')}.1.{rest}"
    if part == "se" and "conv_dw" in convs:
        return f"{block}.{convs.index('conv_dw') + 1}.2.{rest}"
    return name


def _gather_facebook_stage(name: str, names: Collection[str]) -> str:
    """Rename `downsample_layers.1.0.bias` to `stages.1.0.0.bias`, before the blocks, `stages.1.1`."""
    name = re.sub(r"^stages\.(\d+)\.", r"stages.\1.1.", name)
    return re.sub(r"^downsample_layers\.(\d+)\.", r"stages.\1.0.", name)


LAYOUTS = (
    Layout("torchvision", "features layer_scale block conv fc1 fc2 classifier"),
    Layout("torchvision and timm", "conv1 bn1 conv2 bn2 conv3 bn3 downsample layer1 layer2 layer3 layer4 fc"),
    Layout("timm", "features pre_logits fc1 fc2 head fc"),  # VGG
    Layout(  # MobileNet and EfficientNet, with torch's eps in all norms
        "timm", "conv_stem bn1 blocks se conv_reduce conv_expand conv_head bn2 classifier", _number_timm_block, 1e-5
    ),
    Layout("timm", "stem stages downsample blocks gamma conv_dw norm mlp fc1 fc2 head fc"),  # ConvNeXt
    Layout("Facebook's ConvNeXt", "stages gamma dwconv norm pwconv1 pwconv2 head", _gather_facebook_stage),
    Layout(  # CoAtNet
        "timm",
        "stem stages blocks shortcut expand pre_norm conv1 conv1_1x1 norm1 conv2 conv2_kxk attn qkv rel_pos "
        "relative_position_bias_table proj norm2 se mlp fc1 fc2 conv3_1x1 head norm pre_logits fc",
    ),
)


def recognize(names: Collection[str]) -> Layout | None:
    """Return the layout of a known publisher's names, else None."""
    return next((layout for layout in LAYOUTS if layout.knows(names)), None)
