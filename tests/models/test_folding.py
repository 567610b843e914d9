"""Networks without their batch norms compute the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models import attention, residual, separable, sequential
from models.folding import fold_batch_norms

NETWORKS = {
    "vgg11_bn": sequential.vgg,
    "resnet18": residual.resnet,
    "mobilenet_v3_small": separable.mobilenet,
    "efficientnet_b0": separable.efficientnet,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folded_network_computes_the_same(name: str) -> None:
    torch.manual_seed(0)
    net = NETWORKS[name](name, num_classes=5, image_size=64).eval()
    norms = [one for one in net.modules() if isinstance(one, nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias, 0, 0.2)
    folded, images = fold_batch_norms(net), torch.randn(4, 3, 64, 64)
    with torch.inference_mode():
        expected = net(images)
        torch.testing.assert_close(folded(images), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert not any(isinstance(one, nn.BatchNorm2d) for one in folded.modules())
    assert [one for one in net.modules() if isinstance(one, nn.BatchNorm2d)] == norms != []


def test_a_network_that_cannot_be_traced_stays() -> None:
    net = attention.coatnet("coatnet_0", num_classes=5, image_size=64).eval()
    assert fold_batch_norms(net) is net


class Twice(nn.Module):
    """Calls one convolution twice, once without the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(images)) + self.conv(2 * images)


def test_a_convolution_that_is_called_twice_is_not_folded() -> None:
    net = Twice().eval()
    assert fold_batch_norms(net) is net


def test_hooks_are_kept() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()
    assert fold_batch_norms(net) is not net
    net[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    assert fold_batch_norms(net) is net
