"""Initial weights and weight decay of each family, against the papers' values and by new blocks."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hydra.utils import get_class
from torch import Tensor, nn

from models.layers import ConvNet, PooledLinear, ResidualBlock, StochasticDepth, conv_norm
from models.learning.classifier import Classifier
from models.learning.families import (
    AttentionClassifier,
    ResidualClassifier,
    SeparableClassifier,
    SequentialClassifier,
)
from models.options import Settings, apply_options
from models.residual import resnet
from pipeline.build import network
from pipeline.cli.compose import CONF, compose
from tests.support.networks import build, make_recipe
from tests.support.published import PUBLISHED, SMALLEST

# The recipe of each family's networks.
FAMILIES = {
    SequentialClassifier: "sgd_step",
    ResidualClassifier: "sgd",
    SeparableClassifier: "rmsprop",
    AttentionClassifier: "adamw",
}
MODELS, RECIPES = (sorted((CONF / group).glob("*.yaml")) for group in ("model", "recipe"))


def decay_groups(module: Classifier) -> tuple[set[str], set[str]]:
    """Names of the network's parameters with and without weight decay."""
    names = {parameter: name for name, parameter in module.net.named_parameters()}
    decayed, free = module.weight_decay_groups()
    return {names[parameter] for parameter in decayed}, {names[parameter] for parameter in free}


@pytest.mark.parametrize(
    ("family", "architecture", "variant", "num_decayed", "free"),
    [
        (SequentialClassifier, "vgg", "vgg11_bn", 11, r"(bias|\.1\.weight|\.4\.weight)$"),
        # 16 expanding and 17 projecting kernels, the stem, the last 1x1, the linear layer; no depthwise one.
        (SeparableClassifier, "mobilenet", "mobilenet_v2", 36, r"(bias|\.1\.weight|depthwise\.0\.weight)$"),
        (AttentionClassifier, "convnext", "convnext_tiny", 59, r"(bias|norm\.weight|layer_scale|\.[01]\.weight)$"),
        (AttentionClassifier, "coatnet", "coatnet_0", 61, r"(bias|norm\d?\.weight|table|\.1\.weight)$"),
    ],
)
def test_families_decay_as_in_their_papers(
    family: type[Classifier], architecture: str, variant: str, num_decayed: int, free: str
) -> None:
    net = build(architecture, variant, num_classes=10, image_size=32)
    decayed, undecayed = decay_groups(family(net, num_classes=10, recipe=make_recipe()))
    parameters = dict(net.named_parameters())
    assert decayed | undecayed == parameters.keys()
    assert all(parameters[name].ndim > 1 for name in decayed)
    assert all(re.search(free, name) for name in undecayed)
    assert not [name for name in decayed if "depthwise" in name and family is SeparableClassifier]
    assert len(decayed) == num_decayed


def test_every_depthwise_kernel_of_a_separable_network_is_declared() -> None:
    rows = [row for row in PUBLISHED if row.architecture in ("mobilenet", "efficientnet")]
    assert len(rows) == 15
    for row in rows:
        with torch.device("meta"):
            net = build(row.architecture, row.variant)
            decayed, _ = decay_groups(Classifier(net, num_classes=1000, recipe=make_recipe()))
        depthwise = [
            f"{name}.weight"
            for name, layer in net.named_modules()
            if isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1
        ]
        assert len(depthwise) >= 11, row.variant
        assert not decayed & set(depthwise), row.variant


def test_families_start_as_in_their_papers() -> None:
    torch.manual_seed(0)
    vgg = build("vgg", "vgg16", num_classes=10, image_size=32)
    SequentialClassifier(vgg, num_classes=10, recipe=make_recipe())
    assert vgg.stages.stage4[2].weight.std().item() == pytest.approx(math.sqrt(2 / (512 * 9)), rel=0.01)
    assert vgg.head.linear2.weight.std().item() == pytest.approx(math.sqrt(2 / 4096) / 4, rel=0.01)
    assert vgg.head.linear3.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert vgg.stages.stage4[2].bias.abs().max() == 0
    mobile = build("mobilenet", "mobilenet_v2", num_classes=1000, image_size=32)
    SeparableClassifier(mobile, num_classes=1000, recipe=make_recipe())
    block = mobile.stages.stage5[-1]
    assert block.depthwise[0].weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.02)
    assert block.expand[0].weight.std().item() == pytest.approx(math.sqrt(2 / 960), rel=0.01)
    small = build("mobilenet", "mobilenet_v3_small", num_classes=10, image_size=32)
    SeparableClassifier(small, num_classes=10, recipe=make_recipe())
    assert small.head[1].hidden.weight.abs().max().item() == pytest.approx(1 / math.sqrt(1024), rel=0.01)
    for architecture, variant in (("convnext", "convnext_tiny"), ("coatnet", "coatnet_0")):
        net = build(architecture, variant, num_classes=10, image_size=32)
        AttentionClassifier(net, num_classes=10, recipe=make_recipe())
        kernels = [layer.weight for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        assert torch.cat([kernel.flatten() for kernel in kernels]).std().item() == pytest.approx(0.02, rel=0.01)
    table = net.stages.stage3[0].attention.bias.table
    assert table.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("num_classes", [2, 10, 1000])
@pytest.mark.parametrize("architecture", SMALLEST)
def test_the_first_loss_is_that_of_a_guess(architecture: str, num_classes: int) -> None:
    torch.manual_seed(0)
    config = compose("train", [f"+model={architecture}", f"model.variant={SMALLEST[architecture]}"])
    net = network.build_network(config, num_classes=num_classes)
    module = network.build_module(config, net, num_classes=num_classes, recipe=make_recipe())
    with torch.no_grad():
        logits = module.train()(torch.randn(8, 3, net.image_size, net.image_size))
    loss = nn.functional.cross_entropy(logits, torch.arange(8) % num_classes)
    assert loss.item() == pytest.approx(math.log(num_classes), rel=0.1)


def test_a_deep_plain_network_keeps_its_signal() -> None:
    """The reason for He et al. 2015: with Krizhevsky's 0.01 no signal is left after VGG-19's convolutions."""
    torch.manual_seed(0)
    net = build("vgg", "vgg19", num_classes=10, image_size=32)
    SequentialClassifier(net, num_classes=10, recipe=make_recipe())
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        he = net.stages(images).std().item()
        for layer in net.stages.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
        krizhevsky = net.stages(images).std().item()
    assert 0.1 < he < 10
    assert krizhevsky < 1e-6


def test_residual_blocks_start_as_the_identity() -> None:
    torch.manual_seed(0)
    net = resnet("resnet50", num_classes=10)
    ResidualClassifier(net, num_classes=10, recipe=make_recipe())
    features = torch.rand(2, 256, 4, 4)
    block = net.stages.stage1[1].eval()
    assert torch.equal(block(features), features)
    kernel = net.stages.stage4[0].conv2[0].weight
    assert kernel.std().item() == pytest.approx(math.sqrt(2 / (512 * 9)), rel=0.01)


class NewBlock(ResidualBlock):
    """A block of another paper: a depthwise and a pointwise convolution."""

    last_norm = "pointwise.1"
    no_decay = ("depthwise.0.weight",)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = conv_norm(channels, channels, kernel_size=3, groups=channels)
        self.pointwise = conv_norm(channels, channels, kernel_size=1)
        self.stochastic_depth = StochasticDepth()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.stochastic_depth(self.pointwise(self.depthwise(x)))


class UndeclaredBlock(nn.Module):
    """The same without the base class."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv_norm(8, 8, kernel_size=3)
        self.stochastic_depth = StochasticDepth()


def with_block(block: nn.Module) -> ConvNet:
    return ConvNet(nn.Conv2d(3, 8, 3, padding=1), {"stage1": nn.Sequential(block)}, head=PooledLinear(8, 10))


@pytest.mark.parametrize("classifier", [Classifier, *FAMILIES])
def test_a_new_block_gets_what_it_declares(classifier: type[Classifier]) -> None:
    net = apply_options(with_block(NewBlock(8)), Settings(), options={})
    module = classifier(net, num_classes=10, recipe=make_recipe())
    block = net.stages.stage1[0]
    assert block.pointwise[1].weight.abs().max() == 0
    assert block.depthwise[1].weight.min() == 1
    features = torch.rand(2, 8, 4, 4)
    assert torch.equal(block.eval()(features), features)
    decayed, _ = decay_groups(module)
    assert decayed == {"stem.weight", "stages.stage1.0.pointwise.0.weight", "head.linear.weight"}


@pytest.mark.parametrize("missing", ["last_norm", "no_decay"])
def test_a_new_block_that_declares_less_is_no_class(missing: str) -> None:
    declared = {"last_norm": None, "no_decay": ()}
    del declared[missing]
    with pytest.raises(TypeError, match=f"Incomplete does not declare {missing}: write `{missing} = "):
        type("Incomplete", (ResidualBlock,), declared)


def test_a_new_block_without_the_base_class_is_refused() -> None:
    with pytest.raises(TypeError, match="UndeclaredBlock has stochastic depth: derive it from ResidualBlock"):
        with_block(UndeclaredBlock())


@pytest.mark.parametrize(
    ("declared", "error", "message"),
    [
        ({"last_norm": "pointwise.0"}, TypeError, "last_norm=pointwise.0 is a Conv2d"),
        ({"last_norm": "project.1"}, AttributeError, "project"),
        ({"no_decay": ("depthwise.weight",)}, AttributeError, "weight"),
    ],
)
def test_a_declaration_of_no_norm_or_parameter_is_refused(
    declared: dict[str, object], error: type[Exception], message: str
) -> None:
    net = with_block(type("Mistyped", (NewBlock,), declared)(8))
    with pytest.raises(error, match=message):
        ResidualClassifier(net, num_classes=10, recipe=make_recipe()).weight_decay_groups()


def test_every_config_brings_the_recipe_of_its_family() -> None:
    recipes = {choice.stem: compose("train", ["+model=resnet", f"recipe={choice.stem}"]).recipe for choice in RECIPES}
    assert len(recipes) == 7
    refined = {"coatnet": "adamw_coatnet", "lenet": "sgd_lenet"}
    for path in MODELS:
        config = compose("train", [f"+model={path.stem}"])
        family = get_class(config.classifier._target_)
        assert config.recipe == recipes[refined.get(path.stem, FAMILIES[family])], path.stem
        changed = compose("train", [f"+model={path.stem}", "recipe=sgd", "recipe.optimizer.lr=0.5"])
        assert (changed.recipe.optimizer._target_, changed.recipe.optimizer.lr) == ("torch.optim.SGD", 0.5)
        assert changed.recipe.clip_norm is None
