"""Estimated norms against torch in training, and their removal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.analysis.effective_field import effective_field
from models.analysis.fresh_norms import estimate_norms, estimated_norms
from models.layers import StochasticDepth, conv_norm
from tests.support.networks import Calls, build
from tests.support.published import PUBLISHED, SMALLEST, Published

ROWS = [
    row
    for row in PUBLISHED
    if row.architecture in ("resnet", "mobilenet") and SMALLEST[row.architecture] == row.variant
]


def images_of(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def random_net() -> nn.Sequential:
    """Norms, dropout and stochastic depth, with a part in evaluation mode and a part that is frozen."""
    torch.manual_seed(3)
    block = nn.Sequential(conv_norm(8, 8, kernel_size=3, activation=nn.ReLU), nn.Dropout(0.5), StochasticDepth())
    block[2].rate = 0.5
    net = nn.Sequential(conv_norm(3, 8, kernel_size=3, stride=2), block, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    net[0].eval()
    net[2].requires_grad_(False)
    return net


def state(net: nn.Module) -> tuple[list[bytes], list[object], bytes]:
    """Everything that a measurement could change."""
    tensors = [tensor.numpy().tobytes() for tensor in net.state_dict().values()]
    flags = [(layer.training, len(layer._forward_hooks), len(layer._forward_pre_hooks)) for layer in net.modules()]
    options = [(parameter.grad, parameter.requires_grad) for parameter in net.parameters()]
    return tensors, [flags, options, torch.is_grad_enabled()], torch.get_rng_state().numpy().tobytes()


def test_a_measurement_restores_the_network() -> None:
    net, images = random_net(), images_of(6, 3, 16, 16)
    before = state(net)
    plain = effective_field(net, images)
    with torch.no_grad(), estimated_norms(net, images):
        inside = net.state_dict()["0.1.running_var"].clone()
        field = effective_field(net, images)
    assert state(net) == before
    assert not torch.equal(inside, torch.ones(8))
    assert not torch.allclose(field.energy, plain.energy)
    assert not images.requires_grad
    with pytest.raises(KeyError), estimated_norms(net, images):
        raise KeyError
    with pytest.raises(RuntimeError), estimated_norms(net, images[:, :2]):
        pass
    assert state(net) == before


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.variant)
def test_estimated_norms_equal_torchs_training_mode(row: Published) -> None:
    torch.manual_seed(0)
    net = build(row.architecture, row.variant, num_classes=10, image_size=32).double()
    images = images_of(4, 3, 32, 32).double()
    with estimated_norms(net, images):
        estimated = net.eval()(images)
    fresh = net(images)
    net.train()
    for layer in net.modules():
        if isinstance(layer, nn.Dropout | StochasticDepth):
            layer.eval()
    torch.testing.assert_close(estimated, net(images))
    assert not torch.allclose(estimated, fresh)


def test_norms_of_several_batches_equal_brute_force() -> None:
    """Every input of each norm, kept and then averaged; the last batch is smaller, and the last norm is used twice."""
    torch.manual_seed(0)
    shared, last = nn.BatchNorm2d(5), nn.BatchNorm1d(5, affine=False)
    convolutions = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 3)
    with torch.no_grad():
        shared.weight.uniform_(0.5, 2)

    def forward(images: Tensor, *layers: nn.Module) -> Tensor:
        hidden = layers[0](10 + images).relu()
        hidden = layers[3](layers[1](layers[3](hidden)).relu())
        return layers[4](hidden.mean((2, 3)))

    dropped, unused = nn.Dropout(0.5), nn.BatchNorm2d(2)
    net = Calls(forward, *convolutions, dropped, shared, last, unused)
    batches = [images_of(size, 3, 9, 9) * size + size for size in (8, 8, 3)]
    assert estimate_norms(net, iter(batches)) == 19
    inputs: dict[nn.Module, list[Tensor]] = {shared: [], last: []}
    found = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in inputs]
    for norm, kept in inputs.items():
        norm.register_forward_pre_hook(lambda _, given, kept=kept: kept.append(given[0].transpose(0, 1).flatten(1)))
    with torch.no_grad():
        for images in batches:
            net.train()(images)
    for (mean, variance), kept in zip(found, inputs.values(), strict=True):
        values = torch.cat(kept, 1).double()  # (C, all values)
        assert values.shape[1] in (19, (7 * 7 + 5 * 5) * 19)
        torch.testing.assert_close(mean, values.mean(1).float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(variance, values.var(1, correction=0).float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(unused.running_var, torch.ones(2))
    assert net.training


@pytest.mark.parametrize("scale", [0.0, 1e-6, 0.1])
def test_identity_blocks_are_active_meanwhile(scale: float) -> None:
    class Block(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 7, padding=3, bias=False), nn.BatchNorm2d(3)
            self.layer_scale = nn.Parameter(torch.full((3, 1, 1), scale))
            if scale == 0:
                nn.init.zeros_(self.norm.weight)

        def forward(self, images: Tensor) -> Tensor:
            return images + self.layer_scale * self.norm(self.conv(images))

    identity, active = Block(scale), Block(1.0)
    active.conv.load_state_dict(identity.conv.state_dict())
    before, images = state(identity), images_of(2, 3, 9, 9)
    with estimated_norms(identity, images), estimated_norms(active, images):
        one, other = (effective_field(net, images) for net in (identity, active))
    assert torch.equal(one.energy, other.energy)
    assert one.energy.count_nonzero() == 7 * 7
    assert state(identity) == before
    with torch.no_grad():
        identity.layer_scale.fill_(0.5)  # not the initial scale of an identity block
    with estimated_norms(identity, images):
        assert not torch.equal(effective_field(identity, images).energy, one.energy)


def test_a_network_without_batch_norm_is_not_run() -> None:
    def fails(images: Tensor) -> Tensor:
        raise AssertionError("was run")

    with estimated_norms(
        Calls(fails, nn.LayerNorm(3), nn.BatchNorm2d(3, track_running_stats=False)), images_of(2, 3, 4, 4)
    ):
        pass
