"""Fresh networks made ready to be looked at, against torch in training, and that nothing of it stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.analysis.effective_field import effective_field
from models.analysis.fresh_norms import calibrated
from models.layers import StochasticDepth, conv_norm
from tests.models.analysis.test_effective_field import SMALLEST_ROWS, images_of
from tests.support.networks import Calls, build


def chancy() -> nn.Sequential:
    """Norms, dropout and blocks that are left out, some of it in evaluation and some of it not trained."""
    torch.manual_seed(3)
    block = nn.Sequential(conv_norm(8, 8, kernel_size=3, activation=nn.ReLU), nn.Dropout(0.5), StochasticDepth())
    block[2].rate = 0.5
    net = nn.Sequential(conv_norm(3, 8, kernel_size=3, stride=2), block, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    net[0].eval()
    net[2].requires_grad_(False)
    return net


def condition(net: nn.Module) -> tuple[list[bytes], list[object], bytes]:
    """All that a measurement could change."""
    tensors = [tensor.numpy().tobytes() for tensor in net.state_dict().values()]
    flags = [(layer.training, len(layer._forward_hooks), len(layer._forward_pre_hooks)) for layer in net.modules()]
    options = [(parameter.grad, parameter.requires_grad) for parameter in net.parameters()]
    return tensors, [flags, options, torch.is_grad_enabled()], torch.get_rng_state().numpy().tobytes()


def test_a_measurement_leaves_nothing_behind() -> None:
    net, images = chancy(), images_of(6, 3, 16, 16)
    before = condition(net)
    plain = effective_field(net, images)
    with torch.no_grad(), calibrated(net, images):
        inside = net.state_dict()["0.1.running_var"].clone()
        field = effective_field(net, images)
    assert condition(net) == before
    assert not torch.equal(inside, torch.ones(8))
    assert not torch.allclose(field.energy, plain.energy)
    assert not images.requires_grad
    with pytest.raises(KeyError), calibrated(net, images):
        raise KeyError
    with pytest.raises(RuntimeError), calibrated(net, images[:, :2]):
        pass
    assert condition(net) == before


@pytest.mark.parametrize("row", [row for row in SMALLEST_ROWS if row.architecture in ("resnet", "mobilenet")])
def test_a_calibrated_network_does_in_evaluation_what_torch_does_in_training(row: object) -> None:
    torch.manual_seed(0)
    net = build(row.architecture, row.variant, num_classes=10, image_size=32).double()
    images = images_of(4, 3, 32, 32).double()
    with calibrated(net, images):
        found = net.eval()(images)
    uncalibrated = net(images)
    net.train()
    for layer in net.modules():
        if isinstance(layer, nn.Dropout | StochasticDepth):
            layer.eval()
    torch.testing.assert_close(found, net(images))
    assert not torch.allclose(found, uncalibrated)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 0.1])
def test_blocks_that_begin_as_the_identity_are_opened_meanwhile(scale: float) -> None:
    class Block(nn.Module):
        def __init__(self, begin: float) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 7, padding=3, bias=False), nn.BatchNorm2d(3)
            self.layer_scale = nn.Parameter(torch.full((3, 1, 1), begin))
            if begin == 0:
                nn.init.zeros_(self.norm.weight)

        def forward(self, images: Tensor) -> Tensor:
            return images + self.layer_scale * self.norm(self.conv(images))

    shut, opened = Block(scale), Block(1.0)
    opened.conv.load_state_dict(shut.conv.state_dict())
    before, images = condition(shut), images_of(2, 3, 9, 9)
    with calibrated(shut, images), calibrated(opened, images):
        one, other = (effective_field(net, images) for net in (shut, opened))
    assert torch.equal(one.energy, other.energy)
    assert one.energy.count_nonzero() == 7 * 7
    assert condition(shut) == before
    with torch.no_grad():
        shut.layer_scale.fill_(0.5)  # no first weight
    with calibrated(shut, images):
        assert not torch.equal(effective_field(shut, images).energy, one.energy)


def test_a_network_without_batch_norm_is_not_run_to_calibrate_it() -> None:
    def fails(images: Tensor) -> Tensor:
        raise AssertionError("was run")

    with calibrated(Calls(fails, nn.LayerNorm(3), nn.BatchNorm2d(3, track_running_stats=False)), images_of(2, 3, 4, 4)):
        pass
