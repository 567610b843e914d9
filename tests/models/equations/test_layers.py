"""Networks on the notes' equations have the results, parameters, names and hooks of torch's layers."""

from __future__ import annotations

import copy

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.nn import functional

from models.equations.layers import LAYERS, with_reference_ops
from models.layers import ConvNet
from pipeline.cli.compose import compose
from tests.support.networks import build, scatter, without_chance

# Variants and image sizes. Between them: dense and depthwise convolutions, strides, paddings, norms, shortcuts and both
# poolings; at 96 pixels, ResNet's stem pools with a 3x3 kernel at stride 2 and padding 1.
NETS = {"lenet": ("lenet5", 32), "resnet": ("resnet18", 96), "mobilenet": ("mobilenet_v1", 32)}


def make(architecture: str) -> ConvNet:
    variant, image_size = NETS[architecture]
    return build(architecture, variant, num_classes=10, image_size=image_size)


def pair(architecture: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A network on torch's layers, and its copy on the notes' equations."""
    torch.manual_seed(0)
    net = without_chance(scatter(make(architecture))).to(dtype)
    return net, with_reference_ops(copy.deepcopy(net))


def make_images(architecture: str) -> Tensor:
    side, generator = NETS[architecture][1], torch.Generator().manual_seed(0)
    return torch.randn(3, 3, side, side, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("architecture", NETS)
def test_a_network_on_the_equations_equals_torchs(architecture: str) -> None:
    (theirs, ours), images = pair(architecture), make_images(architecture)
    replaced = {type(layer) for layer in theirs.modules()} & LAYERS.keys()
    assert len(replaced) >= 4
    assert not any(type(layer) in LAYERS for layer in ours.modules())
    for training in (True, False):  # the first updates the averages that the second uses
        gradients = []
        for net in (theirs, ours):
            loss = functional.cross_entropy(net.train(training)(images), torch.arange(3))
            gradients.append(torch.autograd.grad(loss, tuple(net.parameters())))
        assert len(gradients[0]) >= 10
        for their_gradient, our_gradient in zip(*gradients, strict=True):
            assert their_gradient.norm() > 0
            assert (our_gradient - their_gradient).norm() <= 1e-9 * their_gradient.norm()
        with torch.no_grad():
            assert (theirs(images) - ours(images)).abs().max() <= 1e-10
        for (name, their_tensor), our_tensor in zip(
            theirs.state_dict().items(), ours.state_dict().values(), strict=True
        ):
            assert (their_tensor - our_tensor).abs().max() <= 1e-10, name


def test_parameters_names_and_hooks_stay() -> None:
    net = build("resnet", "resnet18", image_size=32)
    names, parameters = list(net.state_dict()), list(net.parameters())
    called: list[str] = []
    for name, layer in net.named_modules():
        if type(layer) in LAYERS:
            layer.register_forward_hook(lambda _layer, _inputs, _output, name=name: called.append(name))
    assert with_reference_ops(net) is net
    assert list(net.state_dict()) == names
    assert all(ours is theirs for ours, theirs in zip(net.parameters(), parameters, strict=True))
    net(torch.randn(2, 3, 32, 32))
    assert len(set(called)) == 20 + 20 + 17 + 1 + 1  # convolutions, norms, ReLUs, the average and the linear layer
    assert isinstance(net.stages.stage1[0].conv1[0], nn.Conv2d)


@pytest.mark.parametrize("architecture", ["lenet", "mobilenet"])
def test_autocast_and_channels_last_are_close_to_torchs(architecture: str) -> None:
    """In bfloat16 sums depend on their order, by 13 % in a gradient here; torch's differ by 17 % from its float32."""
    (theirs, ours), images = pair(architecture, torch.float32), make_images(architecture).float()
    logits = []
    for net in (theirs, ours):
        net.eval().to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits.append(net(images.to(memory_format=torch.channels_last)))
        logits[-1].float().square().sum().backward()
        assert logits[-1].dtype == torch.bfloat16
    assert (logits[0] - logits[1]).float().norm() <= 0.02 * logits[0].float().norm()
    for their_parameter, our_parameter in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert their_parameter.grad is not None
        assert our_parameter.grad is not None
        assert our_parameter.grad.dtype == torch.float32
        assert (our_parameter.grad - their_parameter.grad).norm() <= 0.3 * their_parameter.grad.norm()


@pytest.mark.parametrize("architecture", NETS)
def test_shapes_propagate_on_the_meta_device(architecture: str) -> None:
    side = NETS[architecture][1]
    with torch.device("meta"):
        net = with_reference_ops(make(architecture))
        logits = net(torch.empty(2, 3, side, side))
        assert logits.shape == (2, 10)
        logits.sum().backward()
        assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize(
    ("layer", "setting"),
    [
        (nn.Conv2d(4, 4, 3, dilation=2), r"dilation=\(2, 2\)"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding_mode=reflect"),
        (nn.Conv2d(4, 4, 3, padding="same"), "padding=same"),
        (nn.Conv2d(4, 4, (1, 3)), r"kernel_size=\(1, 3\)"),
        (nn.Conv2d(4, 4, 3, stride=(1, 2)), r"stride=\(1, 2\)"),
        (nn.Conv2d(4, 4, 3, groups=2), "groups=2"),
        (nn.Conv2d(4, 8, 3, groups=4), "groups=4"),
        (nn.BatchNorm2d(4, affine=False), "affine=False"),
        (nn.BatchNorm2d(4, momentum=None), "momentum=None"),
        (nn.BatchNorm2d(4, track_running_stats=False), "track_running_stats=False"),
        (nn.MaxPool2d(2, ceil_mode=True), "ceil_mode=True"),
        (nn.MaxPool2d(2, dilation=2), "dilation=2"),
        (nn.MaxPool2d((2, 1)), r"kernel_size=\(2, 1\)"),
        (nn.MaxPool2d(2, return_indices=True), "return_indices=True"),
        (nn.AdaptiveAvgPool2d(7), "output_size=7"),
    ],
    ids=repr,
)
def test_a_layer_without_an_equation_is_named_and_nothing_changes(layer: nn.Module, setting: str) -> None:
    net = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(2, 2), layer))
    kinds = [type(module) for module in net.modules()]
    with pytest.raises(ValueError, match=rf"^1\.1: the notes have no equation for {setting}, keep"):
        with_reference_ops(net)
    assert [type(module) for module in net.modules()] == kinds
    with pytest.raises(ValueError, match=rf"^{type(layer).__name__}: the notes have no equation for {setting}"):
        with_reference_ops(layer)


def test_the_config_of_lenet_chooses_the_ops() -> None:
    def net_of(*words: str) -> ConvNet:
        net = instantiate(compose("train", ["+model=lenet", *words]).model)
        assert isinstance(net, ConvNet)
        return net

    for words in ((), ("model.ops=torch",)):
        assert sum(type(layer) in LAYERS for layer in net_of(*words).modules()) == 11
    kinds = [type(layer) for layer in net_of("model.ops=reference").modules()]
    assert sum(kind in LAYERS.values() for kind in kinds) == 11  # 3 convolutions, 2 poolings, 4 ReLUs, 2 linear
    assert not any(kind in LAYERS for kind in kinds)
    with pytest.raises(ValueError, match="ops=fast is not one of torch, reference"):
        build("lenet", "lenet5", ops="fast")
