"""Every architecture trains, evaluates deterministically, is exported, and refuses wrong options in a sentence."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from models.attention import RelativeAttention, RelativeBias, resize_table
from models.layers import ConvNet, StochasticDepth
from tests.support.networks import build, logits_and_gradient, on_meta, scatter, without_chance
from tests.support.published import PUBLISHED, SMALLEST

ARCHITECTURES = sorted(SMALLEST)
SIDES = defaultdict(lambda: 16, lenet=32)  # pixels; all but LeNet with their stem for small images
# Side of the maps after the stem and after the stages for 64 pixels: with the small stem, and as published.
WITHOUT_STRIDES = {
    "alexnet": ((64, 15), (7, 1)),
    "vgg": ((64, 4), (64, 2)),
    "resnet": ((64, 8), (16, 2)),
    "resnext": ((64, 8), (16, 2)),
    "mobilenet": ((64, 8), (32, 2)),
    "efficientnet": ((64, 8), (32, 2)),
    "convnext": ((64, 8), (16, 2)),
    "coatnet": ((64, 8), (32, 2)),
}
MIN_SIDES = {"alexnet": (7, 63), "vgg": (16, 32), "convnext": (8, 32)}


def smallest(architecture: str, **options: object) -> ConvNet:
    own: dict[str, object] = {"num_classes": 10, "image_size": SIDES[architecture]}
    return build(architecture, SMALLEST[architecture], **{**own, **options})


def make_images(architecture: str, count: int = 4) -> torch.Tensor:
    side, generator = SIDES[architecture], torch.Generator().manual_seed(0)
    return torch.randn(count, 3, side, side, generator=generator)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_training_step_changes_every_parameter(architecture: str, precision: torch.dtype) -> None:
    torch.manual_seed(0)
    net = without_chance(scatter(smallest(architecture))).to(memory_format=torch.channels_last)
    images = make_images(architecture, 2).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
        logits = net(images)
    assert logits.dtype == precision
    loss = functional.cross_entropy(logits.float(), torch.arange(2))
    loss.backward()
    assert loss.isfinite()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []
    optimizer.step()
    assert [name for name, parameter in net.named_parameters() if torch.equal(parameter, before[name])] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_memory_stays_channels_last(architecture: str) -> None:
    net = smallest(architecture).to(memory_format=torch.channels_last)
    outputs: list[torch.Tensor] = []
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _layer, _inputs, output: outputs.append(output))
    net(make_images(architecture).to(memory_format=torch.channels_last))
    assert len(outputs) >= 3
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in outputs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_evaluation_is_deterministic(architecture: str) -> None:
    has_blocks = any(isinstance(layer, StochasticDepth) for layer in smallest(architecture).modules())
    off = {"dropout": 0.0, **({"stochastic_depth": 0.0} if has_blocks else {})}
    images = make_images(architecture)
    for option in off:  # each on its own
        net = scatter(smallest(architecture, **{**off, option: 0.5}))
        with torch.no_grad():
            trained = [net.train()(images) for _ in range(2)]
            evaluated = [net.eval()(images) for _ in range(2)]
            alone = net(images[:1])
        assert not torch.equal(*trained), option
        assert torch.equal(*evaluated), option
        assert (alone - evaluated[0][:1]).norm() <= 1e-4 * alone.norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_state_dict_reproduces_the_network(architecture: str, tmp_path: Path) -> None:
    net, other = scatter(smallest(architecture)).eval(), smallest(architecture).eval()
    images = make_images(architecture)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    other.load_state_dict(torch.load(tmp_path / "net.pth", weights_only=True))
    with torch.no_grad():
        assert torch.equal(net(images), other(images))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_network_is_exported_with_any_number_of_images(architecture: str) -> None:
    net = scatter(smallest(architecture)).eval()
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(net, (make_images(architecture),), dynamic_shapes=({0: batch},)).module()
    for count in (1, 7):
        images = make_images(architecture, count)
        with torch.no_grad():
            logits = net(images)
            assert (program(images) - logits).norm() <= 1e-5 * logits.norm()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_compiled_network_computes_the_same(architecture: str) -> None:
    torch.compiler.reset()
    net = scatter(smallest(architecture)).eval()
    images = make_images(architecture)
    with torch.no_grad():
        logits = net(images)
        compiled = torch.compile(net)(images)
    assert (compiled - logits).norm() <= 1e-4 * logits.norm()


@pytest.mark.parametrize("architecture", WITHOUT_STRIDES)
def test_small_images_keep_their_resolution_early(architecture: str) -> None:
    with torch.device("meta"):
        for image_size, sides in zip((32, 224), WITHOUT_STRIDES[architecture], strict=True):
            net = smallest(architecture, image_size=image_size)
            features = net.stem(torch.empty(1, 3, 64, 64))
            assert (features.shape[-1], net.stages(features).shape[-1]) == sides


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("image_size", [28, 32])
def test_lenet_has_the_maps_of_figure_2(image_size: int, in_channels: int) -> None:
    """LeCun et al. 1998: C1 is 6 maps of 28x28, C3 16 of 10x10, C5 120 units, F6 84."""
    net = build("lenet", "lenet5", image_size=image_size, in_channels=in_channels)
    maps = [net.stem(torch.zeros(2, in_channels, image_size, image_size))]
    for stage in net.stages:
        maps.append(stage(maps[-1]))
    assert [tuple(features.shape[1:]) for features in maps] == [(6, 28, 28), (16, 10, 10), (120, 1, 1)]
    widths = [(layer.in_features, layer.out_features) for layer in net.modules() if isinstance(layer, nn.Linear)]
    assert widths == [(120, 84), (84, 10)]
    assert sum(parameter.numel() for parameter in net.parameters()) == 61_706 + 6 * 25 * (in_channels - 1)


@pytest.mark.parametrize("architecture", MIN_SIDES)
def test_the_smallest_images_are_as_documented(architecture: str) -> None:
    for least, image_size in zip(MIN_SIDES[architecture], (32, 224), strict=True):
        net = smallest(architecture, image_size=image_size).eval()
        with torch.no_grad():
            assert net(torch.zeros(1, 3, least, least)).shape == (1, 10)
            with pytest.raises(RuntimeError):
                net(torch.zeros(1, 3, least - 1, least - 1))


@pytest.mark.parametrize(
    ("architecture", "options", "answer"),
    [
        ("lenet", {"image_size": 224}, "image_size=224 must be 28 or 32 pixels for LeNet-5"),
        ("alexnet", {"image_size": 6}, "image_size=6 must be at least 7 for"),
        ("vgg", {"image_size": 8}, "image_size=8 must be at least 16 for"),
        ("convnext", {"image_size": 7}, "must be at least 8 for this network"),
        ("convnext", {"image_size": [4, 96]}, "image_size=[4, 96] must be at least 8 for this network"),
        ("coatnet", {"image_size": 0}, "must be at least 1 for this network"),
        ("resnet", {"num_classes": 0}, "num_classes=0 must be at least 2 for a classifier"),
        ("efficientnet", {"num_classes": 1}, "num_classes=1 must be at least 2 for a classifier"),
        ("mobilenet", {"in_channels": 0}, "in_channels=0 must be at least 1"),
        ("resnet", {"dropout": 1.0}, "dropout=1.0 must be at least 0 and less than 1"),
        ("resnet", {"stochastic_depth": -0.1}, "stochastic_depth=-0.1 must be at least 0"),
        ("vgg", {"stochastic_depth": 0.1}, "stochastic_depth=0.1: this network has no layer that uses it"),
        ("convnext", {"norm_eps": 1e-3}, "norm_eps=0.001: this network has no layer that uses it"),
        ("resnet", {"norm_momentum": 0.0}, "norm_momentum=0.0 must be above 0 and at most 1"),
        ("resnet", {"norm_eps": 0.0}, "norm_eps=0.0 must be above 0"),
        ("resnet", {"norm_eps": float("nan")}, "norm_eps=nan must be above 0"),
        ("resnet", {"widht": 2}, "widht=2 is not an option of networks: choose from num_classes, "),
        ("resnet", {"dropout": "much"}, "dropout=much must be a number"),
        ("resnet", {"image_size": 32.5}, "image_size=32.5 must be an integer"),
        ("resnet", {"num_classes": True}, "num_classes=True must be an integer"),
    ],
)
def test_an_impossible_option_is_refused(architecture: str, options: dict[str, object], answer: str) -> None:
    with pytest.raises(ValueError, match="=") as error:
        smallest(architecture, **options)
    assert answer in str(error.value)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_unknown_variant_suggests_the_nearest(architecture: str) -> None:
    right = SMALLEST[architecture]
    with pytest.raises(ValueError, match=f"^variant={right}x is not one of .*did you mean {right}"):
        build(architecture, f"{right}x")


def test_norm_constants_and_rates_are_the_published_ones() -> None:
    norms = {}
    for row in PUBLISHED:
        layers = on_meta(row).modules()
        norms[row.variant] = {(layer.eps, layer.momentum) for layer in layers if isinstance(layer, nn.BatchNorm2d)}
    later = {"mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b5", "efficientnet_b6", "efficientnet_b7"}
    for variant, constants in norms.items():
        if constants:
            eps = 1e-3 if variant in later or variant.startswith("efficientnet_v2") else 1e-5
            assert constants == {(eps, 0.01 if variant in later else 0.1)}, variant
    assert [variant for variant, constants in norms.items() if not constants] == [
        *("lenet5", "alexnet", "vgg11", "vgg13", "vgg16", "vgg19"),
        *("convnext_atto", "convnext_femto", "convnext_pico", "convnext_nano"),
        *("convnext_tiny", "convnext_small", "convnext_base", "convnext_large"),
    ]


def test_stochastic_depth_rises_with_the_blocks() -> None:
    def rates(net: nn.Module) -> list[float]:
        return [layer.rate for layer in net.modules() if isinstance(layer, StochasticDepth)]

    tiny = rates(build("convnext", "convnext_tiny"))
    assert tiny == pytest.approx([0.1 * block / 17 for block in range(18)])
    b0 = rates(build("efficientnet", "efficientnet_b0"))
    assert b0 == pytest.approx([0.2 * block / 16 for block in range(16)])
    assert rates(build("resnet", "resnet18")) == [0.0] * 8


def test_stochastic_depth_drops_images_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(StochasticDepth()).train()
    block[0].rate = 0.25
    kept = block(torch.ones(40_000, 2, 1, 1))
    assert kept.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert torch.equal(kept[:, 0], kept[:, 1])
    assert kept.mean().item() == pytest.approx(1.0, abs=0.01)


def test_relative_bias_depends_on_the_offset() -> None:
    torch.manual_seed(0)
    bias = RelativeBias(2, side=3)
    nn.init.normal_(bias.table)
    biases = bias(3, 3)
    assert biases.shape == (2, 9, 9)
    for query in range(9):
        for key in range(9):
            down, right = query // 3 - key // 3 + 2, query % 3 - key % 3 + 2
            assert torch.equal(biases[:, query, key], bias.table[down * 5 + right])


def test_a_table_of_relative_biases_is_resized_as_an_image() -> None:
    torch.manual_seed(0)
    table = torch.randn(25, 2)  # for maps of 3 x 3
    resized = resize_table(table, 4, width=5)
    assert resized.shape == (7 * 9, 2)
    # Bilinear by hand, centre to centre: row 3 of 7 is row 2 of 5, row 0 lies between rows 0 and 1, cut at the border.
    assert torch.allclose(resized[3 * 9 + 4], table[12])
    assert torch.allclose(resized[0], table[0])
    assert torch.equal(RelativeBias(2, side=3)(2, 4), torch.zeros(2, 8, 8))


@pytest.mark.parametrize("size", [(3, 3), (4, 2)])
def test_relative_attention_is_equation_3(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    attention = RelativeAttention(16, 64, side=3)
    nn.init.normal_(attention.bias.table)
    pixels = torch.randn(2, *size, 16)
    height, width = size
    qkv = (pixels.flatten(1, 2) @ attention.qkv.weight.T + attention.qkv.bias).unflatten(2, (2, 3, 32))
    query, key, value = qkv.unbind(3)  # (N, L, A, D)
    scores = torch.einsum("nqad,nkad->naqk", query, key) / 32**0.5 + attention.bias(height, width)
    mixed = torch.einsum("naqk,nkad->nqad", scores.softmax(-1), value).flatten(2)
    expected = (mixed @ attention.project.weight.T + attention.project.bias).view(2, height, width, 64)
    assert torch.allclose(attention(pixels), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (33, 47)])
def test_coatnet_takes_any_image_size(size: tuple[int, int]) -> None:
    net = scatter(smallest("coatnet", image_size=96)).eval()
    logits, gradient = logits_and_gradient(net, torch.randn(1, 3, *size))
    assert logits.shape == (1, 10)
    assert gradient.abs().sum() > 0
