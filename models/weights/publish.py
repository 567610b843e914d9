"""A network's tensors under the names, and in the shapes, of the library that publishes it.

The reverse of `load.py`: the tensors load with `strict=True` into torchvision's or timm's network of the same variant.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from models.arguments import ArgumentError, require
from models.layers import batch_norms
from models.options import SMALL_IMAGE
from models.weights.names import recognize

TORCHVISION, TIMM = "torchvision", "timm"
PUBLISHERS = (TORCHVISION, TIMM)
FLAT_GAP = 3  # from the last layer of a stage of AlexNet or VGG to the next convolution: activation and pooling between
VGG_SIDE = 7  # of the maps that VGG's first linear layer reads
STAGE = re.compile(r"stages\.stage(\d+)\.(\d+)\.(.+)")


class _Place(NamedTuple):
    """The place of a block's tensor: numbers count from 1, positions from 0."""

    stage: int  # number
    block: int  # position in the stage
    group: int  # number; blocks with the same number of output channels
    member: int  # position in the group
    number: int  # of the block in the network
    flat: int  # position of the layer in the network, of AlexNet and VGG
    parts: tuple[str, ...]  # the block's modules
    rest: str  # the name inside the block


@dataclass(frozen=True)
class _Scheme:
    """A publisher's names: of the blocks, of stem and head, and the shapes that differ."""

    rename: Callable[[_Place], str]
    others: Mapping[str, str]  # pattern -> replacement; numbers are those after the last block
    shapes: Mapping[str, Callable[[Tensor], Tensor]] = field(
        default_factory=dict
    )  # pattern of a published name -> reshape
    networks: tuple[str, str] = (r"(.+)", r"\1")  # pattern of a variant -> the library's name


@dataclass(frozen=True)
class Published:
    """The tensors of a network by their published names, and the library's network into which they load."""

    publisher: str
    network: str
    tensors: dict[str, Tensor]
    norm_eps: float | None  # of this network's batch norms; None without any, or where the library's network has it


def publish(net: nn.Module, variant: str, *, names: str) -> Published:
    """Rename the tensors of a network as torchvision or timm names them.

    Raises: ArgumentError for another publisher, a network that it does not have, or one built for small images.
    """
    require(names in PUBLISHERS, f"is not one of {', '.join(PUBLISHERS)}", names=names)
    schemes = next((one for pattern, one in FAMILIES.items() if re.fullmatch(pattern, variant)), {})
    if names not in schemes:
        hint = f", {next(iter(schemes))} has: names={next(iter(schemes))}" if schemes else ""
        raise ArgumentError(("names", names), f": {names} has no network {variant}{hint}")
    size = getattr(net, "image_size", None)
    if size is not None and size <= SMALL_IMAGE:
        reason = f" needs the published strides, but this {variant} was built for images of {size} pixels"
        raise ArgumentError(("names", names), reason)
    scheme = schemes[names]
    tensors = _rename(net.state_dict(), scheme)
    layout, norms = recognize(tensors), batch_norms(net)
    assert layout is not None, f"{variant} has names that {names} does not have"
    differs = layout.norm_eps is not None and bool(norms) and norms[0].eps != layout.norm_eps
    return Published(names, re.sub(*scheme.networks, variant), tensors, norms[0].eps if differs else None)


def _rename(state: Mapping[str, Tensor], scheme: _Scheme) -> dict[str, Tensor]:
    tensors, last = {}, _Place(0, 0, 0, 0, 0, 0, (), "")
    places = dict(_places(state))
    if places:
        last = list(places.values())[-1]
    for name, tensor in state.items():
        if name in places:
            published = scheme.rename(places[name])
        else:
            published = _replace(name, scheme.others)
            published = published.format(number=last.number + 1, group=last.group + 1, last_group=last.group)
        reshape = next((one for pattern, one in scheme.shapes.items() if re.search(pattern, published)), None)
        tensors[published] = reshape(tensor) if reshape else tensor
    assert len(tensors) == len(state), "two tensors have the same published name"
    return tensors


def _places(state: Mapping[str, Tensor]) -> Iterator[tuple[str, _Place]]:
    """Yield the name and the place of each tensor in a stage."""
    blocks: dict[tuple[int, int], dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if match := STAGE.fullmatch(name):
            blocks.setdefault((int(match[1]), int(match[2])), {})[match[3]] = tensor
    group, member, channels, offset, before = 0, 0, 0, FLAT_GAP if "stem.0.weight" in state else 0, (1, 0)
    for number, ((stage, block), tensors) in enumerate(blocks.items(), start=1):
        if stage != before[0]:
            offset += before[1] + FLAT_GAP
        own = [len(tensor) for tensor in tensors.values() if tensor.ndim > 1]
        own_channels = own[-1] if own else channels  # of the block's last matrix or kernels
        starts = stage != before[0] or own_channels != channels or number == 1
        group, member = (group + 1, 0) if starts else (group, member + 1)
        channels, before = own_channels, (stage, block)
        parts = tuple(dict.fromkeys(name.partition(".")[0] for name in tensors))
        for rest in tensors:
            place = _Place(stage, block, group, member, number, offset + block, parts, rest)
            yield f"stages.stage{stage}.{block}.{rest}", place


def _replace(name: str, rules: Mapping[str, str]) -> str:
    """Apply the first rule whose pattern begins the name."""
    for pattern, replacement in rules.items():
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    return name


def _flat(place: _Place) -> str:
    return f"features.{place.flat}.{place.rest}"


def _resnet(place: _Place) -> str:
    rules = {r"(conv)(\d)\.0": r"\1\2", r"conv(\d)\.1": r"bn\1", "shortcut": "downsample"}
    return f"layer{place.stage}.{place.block}.{_replace(place.rest, rules)}"


def _torchvisions_inverted(place: _Place) -> str:
    """Name by the position in the block: `depthwise.0.weight` is `1.0.weight` after an expansion."""
    part, _, inside = place.rest.partition(".")
    inside = _replace(inside, {"reduce": "fc1", "expand": "fc2"}) if part == "gate" else inside
    return f"{place.parts.index(part)}.{inside}"


def _mobilenet_v2(place: _Place) -> str:
    """The projection's convolution and norm are layers of the block itself."""
    part, layer, leaf = place.rest.split(".")
    position = place.parts.index(part)
    inside = f"{position + int(layer)}.{leaf}" if part == "project" else f"{position}.{layer}.{leaf}"
    return f"features.{place.number}.conv.{inside}"


def _mobilenet_v3(place: _Place) -> str:
    return f"features.{place.number}.block.{_torchvisions_inverted(place)}"


def _efficientnet(place: _Place) -> str:
    return f"features.{place.group}.{place.member}.block.{_torchvisions_inverted(place)}"


def _timms_inverted(place: _Place) -> str:
    part, layer, leaf = place.rest.split(".")
    block = f"blocks.{place.group - 1}.{place.member}"
    if part == "gate":
        return f"{block}.se.conv_{layer}.{leaf}"
    convs = tuple(name for name in place.parts if name != "gate")
    position = convs.index(part)
    return f"{block}.{TIMM_CONVS[convs][position] if layer == '0' else f'bn{position + 1}'}.{leaf}"


def _torchvisions_convnext(place: _Place) -> str:
    if place.rest[0].isdigit():  # the norm and the convolution that halve the resolution
        return f"features.{2 * place.stage - 2}.{place.rest}"
    rules = {"depthwise": "block.0", "norm": "block.2", "expand": "block.3", "project": "block.5"}
    return f"features.{2 * place.stage - 1}.{place.block - (place.stage > 1)}.{_replace(place.rest, rules)}"


def _timms_convnext(place: _Place) -> str:
    if place.rest[0].isdigit():
        return f"stages.{place.stage - 1}.downsample.{place.rest}"
    rules = {"depthwise": "conv_dw", "expand": "mlp.fc1", "project": "mlp.fc2", "layer_scale": "gamma"}
    return f"stages.{place.stage - 1}.blocks.{place.block - (place.stage > 1)}.{_replace(place.rest, rules)}"


def _coatnet(place: _Place) -> str:
    rules = TIMM_TRANSFORMER if any(part == "attention" for part in place.parts) else TIMM_MBCONV
    rest = _replace(place.rest, rules)
    if place.block == 0 and "attention" in place.parts and rest.startswith("norm1."):
        rest = f"norm1.norm.{rest.removeprefix('norm1.')}"  # beside the pooling
    return f"stages.{place.stage - 1}.blocks.{place.block}.{rest}"


def _as_kernels(matrix: Tensor) -> Tensor:
    return matrix[..., None, None]  # (C_out, C_in) -> (C_out, C_in, 1, 1)


# The convolutions of timm's inverted residual blocks, by those of ours.
TIMM_CONVS = {
    ("expand", "depthwise", "project"): ("conv_pw", "conv_dw", "conv_pwl"),
    ("expand", "project"): ("conv_exp", "conv_pwl"),
    ("depthwise", "project"): ("conv_dw", "conv_pw"),
    ("depthwise", "pointwise"): ("conv_dw", "conv_pw"),
    ("expand",): ("conv",),
}
TIMM_MBCONV = {
    "norm": "pre_norm", "expand.0": "conv1_1x1", "expand.1": "norm1", "depthwise.0": "conv2_kxk",
    "depthwise.1": "norm2", "gate.reduce": "se.fc1", "gate.expand": "se.fc2", "project": "conv3_1x1",
}  # fmt: skip
TIMM_TRANSFORMER = {
    "attention.qkv": "attn.qkv", "attention.project": "attn.proj", "expand": "mlp.fc1", "project": "mlp.fc2",
    "attention.bias.table": "attn.rel_pos.relative_position_bias_table",
}  # fmt: skip
RESNET = _Scheme(_resnet, {r"stem\.0\.0": "conv1", r"stem\.0\.1": "bn1", r"head\.linear": "fc"})
ALEXNET = {
    "stem": "features",
    "head.linear1": "classifier.1",
    "head.linear2": "classifier.4",
    "head.linear3": "classifier.6",
}
VGG = {"head.linear1": "classifier.0", "head.linear2": "classifier.3", "head.linear3": "classifier.6"}
TIMM_VGG = {"head.linear1": "pre_logits.fc1", "head.linear2": "pre_logits.fc2", "head.linear3": "head.fc"}
TIMM_VGG_SHAPES = {
    r"fc1\.weight": lambda matrix: matrix.unflatten(1, (-1, VGG_SIDE, VGG_SIDE)),
    r"fc2\.weight": _as_kernels,
}
NUMBERED_HEAD, GROUPED_HEAD = {r"head\.0": "features.{number}"}, {r"head\.0": "features.{group}"}
MOBILENET_V3_HEAD = {r"head\.1\.hidden": "classifier.0", r"head\.1\.linear": "classifier.3"}
MOBILENETS = (r"mobilenet_(v\d)(.*)", r"mobilenet\1\2_100")
CONVNEXT = {"stem": "features.0", r"head\.norm": "classifier.0", r"head\.linear": "classifier.2"}
STEM, TIMM_STEM = {"stem": "features.0"}, {r"stem\.0": "conv_stem", r"stem\.1": "bn1"}
TIMM_EFFICIENTNET = {**TIMM_STEM, r"head\.0\.0": "conv_head", r"head\.0\.1": "bn2", r"head\.\d\.linear": "classifier"}
TIMM_MOBILENET_V3 = {
    **TIMM_STEM, r"head\.0\.0": "blocks.{last_group}.0.conv", r"head\.0\.1": "blocks.{last_group}.0.bn1",
    r"head\.1\.hidden": "conv_head", r"head\.1\.linear": "classifier",
}  # fmt: skip
MATRICES_AS_KERNELS = {r"\.(qkv|proj|mlp\.fc1|mlp\.fc2)\.weight": _as_kernels}
TIMM_CONVNEXT = {r"head\.linear": "head.fc"}
TIMM_COATNET = {
    r"stem\.0\.0": "stem.conv1", r"stem\.0\.1": "stem.norm1", r"stem\.1": "stem.conv2",
    r"head\.hidden": "head.pre_logits.fc", r"head\.linear": "head.fc",
}  # fmt: skip
# Pattern of a family's variants -> its publishers.
FAMILIES = {
    "alexnet": {TORCHVISION: _Scheme(_flat, ALEXNET)},
    r"vgg\d+(_bn)?": {TORCHVISION: _Scheme(_flat, VGG), TIMM: _Scheme(_flat, TIMM_VGG, TIMM_VGG_SHAPES)},
    r"(wide_)?resne.+": {TORCHVISION: RESNET, TIMM: RESNET},
    "mobilenet_v1": {TIMM: _Scheme(_timms_inverted, TIMM_EFFICIENTNET, networks=MOBILENETS)},
    "mobilenet_v2": {
        TORCHVISION: _Scheme(_mobilenet_v2, {**STEM, **NUMBERED_HEAD, r"head\.1\.linear": "classifier.1"}),
        TIMM: _Scheme(_timms_inverted, TIMM_EFFICIENTNET, networks=MOBILENETS),
    },
    "mobilenet_v3_.+": {
        TORCHVISION: _Scheme(_mobilenet_v3, {**STEM, **NUMBERED_HEAD, **MOBILENET_V3_HEAD}),
        TIMM: _Scheme(_timms_inverted, TIMM_MOBILENET_V3, {r"^conv_head\.weight": _as_kernels}, MOBILENETS),
    },
    "efficientnet_.+": {
        TORCHVISION: _Scheme(_efficientnet, {**STEM, **GROUPED_HEAD, r"head\.1\.linear": "classifier.1"}),
        TIMM: _Scheme(_timms_inverted, TIMM_EFFICIENTNET, networks=(r"net_v", "netv")),
    },
    "convnext_(atto|femto|pico|nano)": {
        TIMM: _Scheme(_timms_convnext, TIMM_CONVNEXT, MATRICES_AS_KERNELS),
    },
    "convnext_.+": {
        TORCHVISION: _Scheme(_torchvisions_convnext, CONVNEXT, {r"layer_scale$": lambda scale: scale[:, None, None]}),
        TIMM: _Scheme(_timms_convnext, TIMM_CONVNEXT),
    },
    r"coatnet_\d": {TIMM: _Scheme(_coatnet, TIMM_COATNET, MATRICES_AS_KERNELS, (r"$", "_224"))},
}
