"""Published names: the tensors load strictly into the library's own network, which then gives the same logits."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

from models.weights.publish import TIMM, TORCHVISION, Published, publish
from tests.support.networks import build, scatter
from tests.support.published import PUBLISHED, TV
from tests.support.published import TIMM as TIMM_SOURCE
from tests.support.published import Published as Row

LARGE = 224  # pixels: the size of timm's CoAtNets
QUICK = {
    *("alexnet", "vgg11_bn", "resnet18", "resnext50_32x4d", "mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small"),
    *("efficientnet_b0", "convnext_tiny", "coatnet_0"),
}
QUICKEST = {"resnet18", "mobilenet_v1", "mobilenet_v3_small"}
ROWS = [row for row in PUBLISHED if row.source in (TV, TIMM_SOURCE)]
ONLY = {"alexnet": TORCHVISION, "mobilenet_v1": TIMM} | {f"coatnet_{number}": TIMM for number in range(5)}
PAIRS = [(row, names) for row in ROWS for names in (TORCHVISION, TIMM) if ONLY.get(row.variant, names) == names]


def librarys(published: Published) -> nn.Module:
    """The network of the library, for seven classes."""
    if published.publisher == TORCHVISION:
        return torchvision.models.get_model(published.network, num_classes=7)
    further = {} if published.norm_eps is None else {"bn_eps": published.norm_eps}
    return timm.create_model(published.network, num_classes=7, **further)


def test_every_network_has_a_publisher() -> None:
    assert len(ROWS) > 40
    assert len(PAIRS) == 2 * len(ROWS) - len(ONLY)


def cases(quick: set[str], variants: set[str]) -> list[object]:
    """The pairs of some variants; those that are not quick are slow tests."""
    pairs = [(row, names) for row, names in PAIRS if row.variant in variants]
    marks = [() if row.variant in quick else (pytest.mark.slow,) for row, _ in pairs]
    return [
        pytest.param(row, names, id=f"{row.variant}-{names}", marks=mark)
        for (row, names), mark in zip(pairs, marks, strict=True)
    ]


@pytest.mark.parametrize(("row", "names"), cases(QUICK, {row.variant for row, _ in PAIRS}))
def test_names_and_shapes_are_the_librarys(row: Row, names: str) -> None:
    with torch.device("meta"):
        published = publish(
            build(row.architecture, row.variant, num_classes=7, image_size=LARGE), row.variant, names=names
        )
        theirs = librarys(published).state_dict()
    assert {name: tensor.shape for name, tensor in published.tensors.items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }


@pytest.mark.parametrize(
    ("row", "names"), cases({"resnet18", "mobilenet_v1", "mobilenet_v3_small"}, {*QUICK, "efficientnet_v2_s"})
)
def test_the_librarys_network_gives_the_same_logits(row: Row, names: str) -> None:
    ours = scatter(build(row.architecture, row.variant, num_classes=7, image_size=LARGE)).eval()
    published = publish(ours, row.variant, names=names)
    with torch.device("meta"):
        theirs = librarys(published).eval()
    with_tables = theirs.to_empty(device="cpu") if row.architecture != "coatnet" else librarys(published).eval()
    with_tables.load_state_dict(published.tensors, strict=True)
    side = LARGE if row.architecture == "coatnet" else 96
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(with_tables(images), ours(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "names", "message"),
    [
        ("lenet5", "timm", "names=timm: timm has no network lenet5"),
        ("alexnet", "timm", "names=timm: timm has no network alexnet, torchvision has: names=torchvision"),
        ("resnet18", "keras", "names=keras is not one of torchvision, timm"),
    ],
)
def test_a_network_without_a_publisher_is_refused(variant: str, names: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        publish(nn.Linear(1, 1), variant, names=names)


def test_a_network_for_small_images_is_refused() -> None:
    net = build("resnet", "resnet18", image_size=32)
    message = "names=torchvision needs the published strides, but this resnet18 was built for images of 32 pixels"
    with pytest.raises(ValueError, match=message):
        publish(net, "resnet18", names="torchvision")
