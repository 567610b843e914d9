"""Effective receptive fields against closed forms, torch's gradients channel by channel, and counting in squares."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.analysis.effective_field import SHARES, EffectiveField, effective_field, warnings_about
from models.analysis.fresh_norms import calibrated
from models.analysis.summary import Layer, Pixels, inspect
from models.layers import SqueezeExcite
from tests.support.networks import Calls, build
from tests.support.published import PUBLISHED, SMALLEST

SMALLEST_ROWS = [row for row in PUBLISHED if SMALLEST[row.architecture] == row.variant]


def images_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def equal(*kernels: int, strides: tuple[int, ...] = ()) -> nn.Sequential:
    """Convolutions of one channel without padding, all weights alike."""
    convs = [
        nn.Conv2d(1, 1, kernel, stride=stride, bias=False)
        for kernel, stride in zip(kernels, strides or (1,) * len(kernels), strict=True)
    ]
    for conv in convs:
        nn.init.constant_(conv.weight, 1 / conv.weight.numel())
    return nn.Sequential(*convs)


def convolved(*kernels: int, strides: tuple[int, ...] = ()) -> np.ndarray:
    """Along one axis, how one unit behind such convolutions depends on the pixels of its field."""
    line, jump = np.ones(1), 1
    for kernel, stride in zip(kernels, strides or (1,) * len(kernels), strict=True):
        taps = np.zeros((kernel - 1) * jump + 1)
        taps[::jump] = 1 / kernel
        line, jump = np.convolve(line, taps), jump * stride
    return line


def sides_by_counting(energy: np.ndarray, center: tuple[float, float]) -> dict[float, int]:
    """The definition: squares of growing side, of which each pixel is asked."""
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
    assert field.sides == sides_by_counting(expected, field.center)
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
    size, found = depth * (kernel - 1) + 1, []
    for seed in range(24):
        layers = [nn.Conv2d(3 if place == 0 else 12, 12, kernel, bias=False) for place in range(depth)]
        for place, layer in enumerate(layers):
            drawn = images_of(*layer.weight.shape, seed=1000 * seed + place)
            layer.weight = nn.Parameter(drawn / math.sqrt(drawn[0].numel()))
        found += variances(effective_field(nn.Sequential(*layers), images_of(1, 3, size, size), seed=seed))
    assert len(found) == 48
    assert np.sqrt(np.mean(found)) == pytest.approx(math.sqrt(depth * (kernel**2 - 1) / 12), rel=0.04)


def test_a_pointwise_network_sees_one_pixel() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Hardswish(), nn.Conv2d(8, 5, 1))
    field = effective_field(net, images_of(3, 3, 10, 7))
    assert field.sides == dict.fromkeys(SHARES, 1)
    assert field.center == (5, 3)
    assert field.energy[5, 3] == field.energy.sum() == 1
    assert field.area(0.5) == 1 / 70


def test_a_mean_in_front_spreads_over_the_image() -> None:
    net = Calls(lambda x, conv: conv(x + 3 * x.mean((2, 3), keepdim=True)), equal(1)[0])
    field = effective_field(net, images_of(1, 1, 6, 9))
    gradient = np.full((6, 9), 3 / 54)
    gradient[3, 4] += 1
    np.testing.assert_allclose(field.energy, gradient**2 / (gradient**2).sum(), rtol=1e-5)
    assert field.layer == "layers.0"


def test_a_gate_lets_every_pixel_count_outside_of_the_window() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(SqueezeExcite(3, 4, activation=nn.SiLU), nn.Conv2d(3, 4, 3))
    field = effective_field(net, images_of(2, 3, 16, 16))
    assert (field.energy > 0).all()
    assert field.side(0.5) <= 3 < field.side(1)


def energy_by_channel(layers: nn.Module, images: Tensor, place: tuple[int, int]) -> Tensor:
    """Squared gradients of one unit, channel by channel and image by image, scaled to a sum of 1."""
    pixels = images.clone().requires_grad_()
    unit = layers(pixels)[:, :, place[0], place[1]].sum(0)
    gradients = [torch.autograd.grad(channel, pixels, retain_graph=True)[0] for channel in unit]
    assert len(gradients) == unit.numel() > 0
    energy = sum(gradient.double().square().sum((0, 1)) for gradient in gradients)
    return energy / energy.sum()


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (3, 3)])
def test_where_no_channels_mix_the_energy_is_that_of_each_alone(channels: int, groups: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, groups=groups), nn.SiLU(), nn.Conv2d(6, channels, 3, groups=groups))
    images = images_of(5, 3, 12, 11)
    torch.testing.assert_close(effective_field(net, images).energy, energy_by_channel(net, images, (4, 3)))


def test_random_signs_stand_for_all_channels() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.SiLU(), nn.Conv2d(6, 20, 3))
    image = images_of(1, 3, 7, 7)
    expected = energy_by_channel(net, image, (1, 1))
    found = effective_field(net, image.expand(20000, -1, -1, -1), images_at_once=5000).energy
    torch.testing.assert_close(found, expected, rtol=0.06, atol=0)  # 6 deviations: of each square about sqrt(2 / 20000)
    # With equal signs channels cancel: that would be another map.
    plain = nn.Sequential(net, nn.Conv2d(20, 1, 1))
    nn.init.ones_(plain[1].weight)
    assert (energy_by_channel(plain, image, (1, 1)) - expected).abs().sum() > 0.3


def test_images_come_in_any_portions() -> None:
    net, images = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3)), images_of(5, 3, 9, 9)
    one, all_of_them = (effective_field(net, images, images_at_once=count).energy for count in (1, 5))
    torch.testing.assert_close(one, all_of_them)


@pytest.mark.parametrize("size", [3, 5])
def test_channels_may_come_last_even_where_no_size_tells(size: int) -> None:
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


def test_layers_used_again_and_overwritten_are_those_of_their_map() -> None:
    def shared(images: Tensor, conv: nn.Module, relu: nn.Module, linear: nn.Module) -> Tensor:
        maps = relu(conv(relu(conv(images))))
        return relu(linear(maps.mean((2, 3))))

    torch.manual_seed(0)
    conv, images = nn.Conv2d(3, 3, 3), images_of(4, 3, 9, 9)
    field = effective_field(Calls(shared, conv, nn.ReLU(inplace=True), nn.Linear(3, 2)), images)
    alone = effective_field(nn.Sequential(conv, nn.ReLU(), copy.deepcopy(conv), nn.ReLU()), images)
    assert torch.equal(field.energy, alone.energy)
    assert field.layer == "layers.1"


def test_a_map_is_measured_before_others_overwrite_it() -> None:
    net = Calls(lambda x, conv: conv(x).mul_(x.mean((1, 2, 3), keepdim=True)), nn.Conv2d(3, 4, 3))
    field = effective_field(net, images_of(2, 3, 9, 9), layer="layers.0")
    assert field.energy.count_nonzero() == 9


def test_images_may_be_overwritten_by_the_network_and_come_from_inference_mode() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3)
    with torch.inference_mode():
        images = images_of(2, 3, 9, 9)
    field = effective_field(nn.Sequential(nn.ReLU(inplace=True), conv), images)
    assert torch.equal(field.energy, effective_field(nn.Sequential(nn.ReLU(), conv), images).energy)
    assert torch.equal(images, images_of(2, 3, 9, 9))


def test_a_layer_can_be_named_and_the_last_map_is_before_what_flattens_it() -> None:
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
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), "1", "1 of Sequential puts out a map"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), None, "no layer of Sequential puts out a map"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Sigmoid()), "2", "Sequential has no layer 2: take one"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Threshold(1e6, 0)), None, "gradients of 1 come to 0.0"),
        (nn.ConvTranspose2d(3, 4, 1, stride=3), None, "rows 11 read no pixel"),
    ],
)
def test_what_has_no_effective_field_is_refused_by_name(net: nn.Module, layer: str | None, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        effective_field(net, images_of(1, 3, 8, 8), layer=layer)


def test_images_of_whole_numbers_and_shares_above_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch.uint8 tensor of \(1, 3, 8, 8\): give floats"):
        effective_field(nn.Conv2d(3, 4, 3), images_of(1, 3, 8, 8).byte())
    with pytest.raises(ValueError, match=r"a share of 1\.5"):
        effective_field(nn.Conv2d(3, 4, 3), images_of(1, 3, 8, 8)).side(1.5)


@st.composite
def fields(draw: st.DrawFn) -> EffectiveField:
    """Whole numbers of energy, so that no rounding decides, around any pixel, edge or corner."""
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    numbers = draw(st.lists(st.integers(0, 5), min_size=height * width, max_size=height * width))
    energy = torch.tensor(numbers, dtype=torch.float64).reshape(height, width)
    center = Pixels(draw(st.integers(0, 2 * height - 2)) / 2, draw(st.integers(0, 2 * width - 2)) / 2)
    energy[int(center.rows), int(center.columns)] += 1
    return EffectiveField("layer", energy, center, 1)


@settings(max_examples=150, deadline=None)
@given(fields())
def test_sides_are_those_found_by_counting(field: EffectiveField) -> None:
    expected = sides_by_counting(field.energy.numpy(), field.center)
    assert field.sides == expected
    rows, columns = np.indices(field.energy.shape)
    for share, side in expected.items():
        apart = np.maximum(abs(rows - field.center.rows), abs(columns - field.center.columns))
        assert field.area(share) == pytest.approx((apart <= (side - 1) / 2).mean())


@pytest.mark.parametrize("row", SMALLEST_ROWS, ids=lambda row: row.variant)
def test_every_architecture_has_an_effective_field_inside_its_windows(row: object) -> None:
    size = 32 if row.architecture == "lenet" else 64
    torch.manual_seed(0)
    net, images = build(row.architecture, row.variant, image_size=size, num_classes=10), images_of(1, 3, size, size)
    inspection = inspect(net, tuple(images.shape[1:]))
    with calibrated(net, images):
        field = effective_field(net, images)
        layer = inner(inspection.layers, net, limit=size // 2)
        inside = effective_field(net, images, layer=layer.name)
    # LeNet's last windows are those of its linear layers, which put out no map.
    assert field.layer == ("stages.stage2.2" if row.variant == "lenet5" else inspection.last_window.name)
    assert float(field.energy.sum()) == pytest.approx(1)
    field_size, jump, offset = (pixels.rows for pixels in layer.window)
    count = layer.shape[1] if layer.shape[1] == layer.shape[2] else layer.shape[0]
    first = int(offset + jump * (count // 2))
    assert inside.center == (first + (field_size - 1) / 2,) * 2
    box = slice(first, first + int(field_size))
    assert 0 <= first <= first + field_size <= size  # so that there is an outside
    assert float(inside.energy[box, box].sum()) == pytest.approx(1)
    assert inside.energy.count_nonzero() == inside.energy[box, box].count_nonzero()
    assert inside.energy[box, box].ne(0).double().mean() > 0.9


def inner(layers: list[Layer], net: nn.Module, *, limit: int) -> Layer:
    """The last one with a window up to a limit, among those that see nothing else."""
    last = {layer.name: layer for layer in layers if layer.window is not None and len(layer.shape) == 3}
    alone = [one for one in last.values() if not one.whole and not any(net.get_submodule(one.name).children())]
    return [one for one in alone if 1 < one.window.size.rows <= limit][-1]


def test_a_field_smaller_than_the_image_and_one_that_fades_are_warned_of() -> None:
    net = equal(3, 3, 3)
    small, fading = warnings_about(effective_field(net, images_of(1, 1, 18, 16)), inspect(net, (1, 18, 16)))
    assert small == (
        "the receptive field of 7 x 7 px at 2 is smaller than the image of 18 x 16 px: "
        "objects larger than it are seen only in parts"
    )
    assert fading.startswith("90% of what moves 2 lies in 5 x 5 px of the image of 18 x 16 px: pixels farther out")
    (along_rows,) = warnings_about(effective_field(net, images_of(1, 1, 18, 7)), inspect(net, (1, 18, 7)))
    assert "7 x 7 px at 2 is smaller than the image of 18 x 7 px" in along_rows


def test_a_wide_field_is_not_warned_of_and_a_gate_is_mentioned() -> None:
    net = nn.Sequential(nn.Conv2d(3, 1, 9, padding=4), nn.Flatten(2))
    nn.init.ones_(net[0].weight)
    images = images_of(1, 3, 9, 9)
    assert warnings_about(effective_field(net, images), inspect(net, (3, 9, 9))) == []
    gated = nn.Sequential(SqueezeExcite(3, 4), nn.Conv2d(3, 1, 7, padding=3))
    nn.init.ones_(gated[1].weight)
    (said,) = warnings_about(effective_field(gated, images), inspect(gated, (3, 9, 9)))
    assert said.endswith("9 x 9 px: the rest comes only by means, gates or attention, first in 0.pool")
