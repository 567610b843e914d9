"""Effective receptive fields against closed forms, gradients channel by channel, and enumerated squares."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.analysis.effective_field import SHARES, EffectiveField, effective_field, field_warnings
from models.analysis.fresh_norms import estimated_norms
from models.analysis.summary import LayerSummary, Pixels, summarize
from models.layers import SqueezeExcite
from tests.support.networks import Calls, build
from tests.support.published import PUBLISHED, SMALLEST, Published

SMALLEST_ROWS = [row for row in PUBLISHED if SMALLEST[row.architecture] == row.variant]


def images_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def equal(*kernels: int, strides: tuple[int, ...] = ()) -> nn.Sequential:
    """Convolutions of one channel with equal weights and no padding."""
    convs = [
        nn.Conv2d(1, 1, kernel, stride=stride, bias=False)
        for kernel, stride in zip(kernels, strides or (1,) * len(kernels), strict=True)
    ]
    for conv in convs:
        nn.init.constant_(conv.weight, 1 / conv.weight.numel())
    return nn.Sequential(*convs)


def convolved(*kernels: int, strides: tuple[int, ...] = ()) -> np.ndarray:
    """The gradient of one unit after such convolutions, along one axis."""
    line, jump = np.ones(1), 1
    for kernel, stride in zip(kernels, strides or (1,) * len(kernels), strict=True):
        taps = np.zeros((kernel - 1) * jump + 1)
        taps[::jump] = 1 / kernel
        line, jump = np.convolve(line, taps), jump * stride
    return line


def enumerated_sides(energy: np.ndarray, center: tuple[float, float]) -> dict[float, int]:
    """The definition: squares of growing side, pixel by pixel."""
    rows, columns = np.indices(energy.shape)
    sides = {}
    for share in SHARES:
        for side in range(1, 2 * max(energy.shape) + 1):
            reach = (side - 1) / 2
            inside = (abs(rows - center[0]) <= reach) & (abs(columns - center[1]) <= reach)
            if energy[inside].sum() >= share * energy.sum():
                sides[share] = side
                break
    return sides


@pytest.mark.parametrize(
    ("kernels", "strides"),
    [((3,), (1,)), ((3,) * 4, (1,) * 4), ((5, 3, 3), (2, 1, 2)), ((4, 3, 2), (3, 1, 1)), ((4, 3), (4, 1))],
)
def test_equal_weights_spread_like_their_convolution(kernels: tuple[int, ...], strides: tuple[int, ...]) -> None:
    field = effective_field(equal(*kernels, strides=strides), images_of(2, 1, 41, 38))
    expected, line = np.zeros((41, 38)), convolved(*kernels, strides=strides)
    corner = [round(middle - (len(line) - 1) / 2) for middle in field.center]
    expected[corner[0] : corner[0] + len(line), corner[1] : corner[1] + len(line)] = np.outer(line, line) ** 2
    np.testing.assert_allclose(field.energy, expected / expected.sum(), atol=1e-7)
    assert field.sides == enumerated_sides(expected, field.center)
    assert field.center.rows % 1 == (len(line) + 1) % 2 / 2
    assert (field.layer, field.num_images) == (str(len(kernels) - 1), 2)


def variances(field: EffectiveField) -> list[float]:
    """Second moments of the energy along rows and columns, in pixels squared."""
    energy = field.energy.numpy()
    return [
        float((energy.sum(1 - axis) * (np.arange(energy.shape[axis]) - field.center[axis]) ** 2).sum())
        for axis in (0, 1)
    ]


@pytest.mark.parametrize(("kernel", "depth"), [(3, 2), (3, 8), (5, 4), (5, 8)])
def test_random_weights_spread_with_the_root_of_depth(kernel: int, depth: int) -> None:
    # Luo et al. 2016, section 2.2: squared gradients are on average the uniform kernel convolved `depth` times.
    size, spreads = depth * (kernel - 1) + 1, []
    for seed in range(24):
        layers = [nn.Conv2d(3 if index == 0 else 12, 12, kernel, bias=False) for index in range(depth)]
        for index, layer in enumerate(layers):
            drawn = images_of(*layer.weight.shape, seed=1000 * seed + index)
            layer.weight = nn.Parameter(drawn / math.sqrt(drawn[0].numel()))
        spreads += variances(effective_field(nn.Sequential(*layers), images_of(1, 3, size, size), seed=seed))
    assert len(spreads) == 48
    assert np.sqrt(np.mean(spreads)) == pytest.approx(math.sqrt(depth * (kernel**2 - 1) / 12), rel=0.04)


def test_a_pointwise_network_reads_one_pixel() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Hardswish(), nn.Conv2d(8, 5, 1))
    field = effective_field(net, images_of(3, 3, 10, 7))
    assert field.sides == dict.fromkeys(SHARES, 1)
    assert field.center == (5, 3)
    assert field.energy[5, 3] == field.energy.sum() == 1
    assert field.area(0.5) == 1 / 70


def test_a_mean_before_the_layer_spreads_over_the_image() -> None:
    net = Calls(lambda x, conv: conv(x + 3 * x.mean((2, 3), keepdim=True)), equal(1)[0])
    field = effective_field(net, images_of(1, 1, 6, 9))
    gradient = np.full((6, 9), 3 / 54)
    gradient[3, 4] += 1
    np.testing.assert_allclose(field.energy, gradient**2 / (gradient**2).sum(), rtol=1e-5)
    assert field.layer == "layers.0"


def test_a_gate_gives_pixels_outside_the_kernel_influence() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(SqueezeExcite(3, 4, activation=nn.SiLU), nn.Conv2d(3, 4, 3))
    field = effective_field(net, images_of(2, 3, 16, 16))
    assert (field.energy > 0).all()
    assert field.side(0.5) <= 3 < field.side(1)


def energy_by_channel(layers: nn.Module, images: Tensor, position: tuple[int, int]) -> Tensor:
    """Squared gradients of one unit, channel by channel and image by image, scaled to a sum of 1."""
    pixels = images.clone().requires_grad_()
    unit = layers(pixels)[:, :, position[0], position[1]].sum(0)
    gradients = [torch.autograd.grad(channel, pixels, retain_graph=True)[0] for channel in unit]
    assert len(gradients) == unit.numel() > 0
    energy = sum(gradient.double().square().sum((0, 1)) for gradient in gradients)
    return energy / energy.sum()


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (3, 3)])
def test_energy_of_separate_channels_is_exact(channels: int, groups: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, groups=groups), nn.SiLU(), nn.Conv2d(6, channels, 3, groups=groups))
    images = images_of(5, 3, 12, 11)
    torch.testing.assert_close(effective_field(net, images).energy, energy_by_channel(net, images, (4, 3)))


def test_random_signs_estimate_the_sum_over_channels() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.SiLU(), nn.Conv2d(6, 20, 3))
    image = images_of(1, 3, 7, 7)
    expected = energy_by_channel(net, image, (1, 1))
    energy = effective_field(net, image.expand(20000, -1, -1, -1), images_at_once=5000).energy
    torch.testing.assert_close(energy, expected, rtol=0.06, atol=0)  # 6 deviations of about sqrt(2 / 20000)
    # Equal signs would let channels cancel and give another map.
    plain = nn.Sequential(net, nn.Conv2d(20, 1, 1))
    nn.init.ones_(plain[1].weight)
    assert (energy_by_channel(plain, image, (1, 1)) - expected).abs().sum() > 0.3


def test_energy_does_not_depend_on_images_at_once() -> None:
    net, images = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3)), images_of(5, 3, 9, 9)
    one, five = (effective_field(net, images, images_at_once=count).energy for count in (1, 5))
    torch.testing.assert_close(one, five)


@pytest.mark.parametrize("size", [3, 5])
def test_channels_last_maps_are_recognised_even_with_equal_sizes(size: int) -> None:
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 3)
    pointwise = nn.Conv2d(3, 3, 1)
    pointwise.weight = nn.Parameter(linear.weight[:, :, None, None].detach())
    last = Calls(lambda x, conv, linear: linear(conv(x).permute(0, 2, 3, 1)), conv, linear)
    images = images_of(3, 3, size, size + 3 if size == 5 else 3)
    field, expected = effective_field(last, images), effective_field(nn.Sequential(conv, pointwise), images)
    torch.testing.assert_close(field.energy, expected.energy)
    assert field.layer == "layers.1"
    assert field.center == expected.center == (images.shape[2] // 2, images.shape[3] // 2)


def test_the_map_of_a_reused_layer_is_that_of_its_last_call() -> None:
    def shared(images: Tensor, conv: nn.Module, relu: nn.Module, linear: nn.Module) -> Tensor:
        maps = relu(conv(relu(conv(images))))
        return relu(linear(maps.mean((2, 3))))

    torch.manual_seed(0)
    conv, images = nn.Conv2d(3, 3, 3), images_of(4, 3, 9, 9)
    field = effective_field(Calls(shared, conv, nn.ReLU(inplace=True), nn.Linear(3, 2)), images)
    alone = effective_field(nn.Sequential(conv, nn.ReLU(), copy.deepcopy(conv), nn.ReLU()), images)
    assert torch.equal(field.energy, alone.energy)
    assert field.layer == "layers.1"


def test_a_map_is_measured_before_it_is_overwritten() -> None:
    net = Calls(lambda x, conv: conv(x).mul_(x.mean((1, 2, 3), keepdim=True)), nn.Conv2d(3, 4, 3))
    field = effective_field(net, images_of(2, 3, 9, 9), layer="layers.0")
    assert field.energy.count_nonzero() == 9


def test_images_from_inference_mode_survive_in_place_operations() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3)
    with torch.inference_mode():
        images = images_of(2, 3, 9, 9)
    field = effective_field(nn.Sequential(nn.ReLU(inplace=True), conv), images)
    assert torch.equal(field.energy, effective_field(nn.Sequential(nn.ReLU(), conv), images).energy)
    assert torch.equal(images, images_of(2, 3, 9, 9))


def test_the_default_layer_is_the_last_with_a_map() -> None:
    net = nn.Sequential(equal(3, 3), nn.Sequential(equal(5), nn.Flatten(), nn.Linear(36, 2)))
    images = images_of(1, 1, 14, 14)
    assert {layer: effective_field(net, images, layer=layer).side(1) for layer in ("0.0", "0", "1.0.0")} == {
        "0.0": 3,
        "0": 5,
        "1.0.0": 9,
    }
    assert effective_field(net, images).layer == "1.0.0"


@pytest.mark.parametrize(
    ("net", "layer", "reason"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), "1", "layer 1 of Sequential returns no map"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), None, "no layer of Sequential returns a map"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Sigmoid()), "2", "Sequential has no layer 2: take a name"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Threshold(1e6, 0)), None, "gradients of 1 sum to 0.0"),
        (nn.ConvTranspose2d(3, 4, 1, stride=3), None, "rows 11 of the map of the network itself read no pixel"),
    ],
)
def test_layers_without_an_effective_field_are_refused(net: nn.Module, layer: str | None, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        effective_field(net, images_of(1, 3, 8, 8), layer=layer)


def test_integer_images_and_shares_above_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch.uint8 tensor of \(1, 3, 8, 8\): give floats"):
        effective_field(nn.Conv2d(3, 4, 3), images_of(1, 3, 8, 8).byte())
    with pytest.raises(ValueError, match=r"a share of 1\.5 of the energy is not in \(0, 1\]"):
        effective_field(nn.Conv2d(3, 4, 3), images_of(1, 3, 8, 8)).side(1.5)


@st.composite
def fields(draw: st.DrawFn) -> EffectiveField:
    """Integer energies, free of rounding, around any pixel, edge or corner."""
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    numbers = draw(st.lists(st.integers(0, 5), min_size=height * width, max_size=height * width))
    energy = torch.tensor(numbers, dtype=torch.float64).reshape(height, width)
    center = Pixels(draw(st.integers(0, 2 * height - 2)) / 2, draw(st.integers(0, 2 * width - 2)) / 2)
    energy[int(center.rows), int(center.columns)] += 1
    return EffectiveField("layer", energy, center, 1)


@settings(max_examples=150, deadline=None)
@given(fields())
def test_sides_equal_enumerated_squares(field: EffectiveField) -> None:
    expected = enumerated_sides(field.energy.numpy(), field.center)
    assert field.sides == expected
    rows, columns = np.indices(field.energy.shape)
    for share, side in expected.items():
        distances = np.maximum(abs(rows - field.center.rows), abs(columns - field.center.columns))
        assert field.area(share) == pytest.approx((distances <= (side - 1) / 2).mean())


@pytest.mark.parametrize("row", SMALLEST_ROWS, ids=lambda row: row.variant)
def test_effective_fields_lie_inside_local_fields(row: Published) -> None:
    size = 32 if row.architecture == "lenet" else 64
    torch.manual_seed(0)
    net, images = build(row.architecture, row.variant, image_size=size, num_classes=10), images_of(1, 3, size, size)
    summary = summarize(net, tuple(images.shape[1:]))
    with estimated_norms(net, images):
        field = effective_field(net, images)
        layer = last_inside(summary.layers, net, limit=size // 2)
        inside = effective_field(net, images, layer=layer.name)
    # LeNet's last local fields are those of its linear layers, which return no map.
    assert field.layer == ("stages.stage2.2" if row.variant == "lenet5" else summary.last_local_layer.name)
    assert float(field.energy.sum()) == pytest.approx(1)
    count = layer.shape[1] if layer.shape[1] == layer.shape[2] else layer.shape[0]
    first = int(layer.rows.offset + layer.rows.stride * (count // 2))
    assert inside.center == (first + (layer.rows.size - 1) / 2,) * 2
    box = slice(first, first + layer.rows.size)
    assert 0 <= first <= first + layer.rows.size <= size  # so that some pixels lie outside
    assert float(inside.energy[box, box].sum()) == pytest.approx(1)
    assert inside.energy.count_nonzero() == inside.energy[box, box].count_nonzero()
    assert inside.energy[box, box].ne(0).double().mean() > 0.9


def last_inside(layers: list[LayerSummary], net: nn.Module, *, limit: int) -> LayerSummary:
    """The last layer with a local field of at most `limit` pixels and no global one."""
    last = {layer.name: layer for layer in layers if layer.local_size and len(layer.shape) == 3}
    local = [one for one in last.values() if not one.is_global and not any(net.get_submodule(one.name).children())]
    return [one for one in local if 1 < one.rows.size <= limit][-1]


def test_small_receptive_and_effective_fields_cause_warnings() -> None:
    net = equal(3, 3, 3)
    receptive, effective = field_warnings(effective_field(net, images_of(1, 1, 18, 16)), summarize(net, (1, 18, 16)))
    assert receptive == (
        "the receptive field of 7 x 7 px at 2 is smaller than the image of 18 x 16 px: "
        "no unit covers larger objects completely"
    )
    assert effective == (
        "90% of the influence on 2 lies in 5 x 5 px of the image of 18 x 16 px: "
        "pixels farther out hardly count (rule of thumb: less than a third of the side)"
    )
    (along_rows,) = field_warnings(effective_field(net, images_of(1, 1, 18, 7)), summarize(net, (1, 18, 7)))
    assert "7 x 7 px at 2 is smaller than the image of 18 x 7 px" in along_rows


def test_a_large_field_causes_no_warning_and_a_gate_is_mentioned() -> None:
    net = nn.Sequential(nn.Conv2d(3, 1, 9, padding=4), nn.Flatten(2))
    nn.init.ones_(net[0].weight)
    images = images_of(1, 3, 9, 9)
    assert field_warnings(effective_field(net, images), summarize(net, (3, 9, 9))) == []
    gated = nn.Sequential(SqueezeExcite(3, 4), nn.Conv2d(3, 1, 7, padding=3))
    nn.init.ones_(gated[1].weight)
    (warning,) = field_warnings(effective_field(gated, images), summarize(gated, (3, 9, 9)))
    assert warning.endswith("9 x 9 px: the rest acts only through means, gates or attention, first in 0.pool")
