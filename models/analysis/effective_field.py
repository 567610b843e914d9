"""The effective receptive field: how strongly each pixel influences a unit.

Luo et al. 2016, "Understanding the effective receptive field in deep convolutional neural networks"; its size is given
in squares, as in Ding et al. 2022, "Scaling up your kernels to 31x31", section 5.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.analysis.axes import AXES, AXIS_NAMES, TensorAxes
from models.analysis.receptive_field import receptive_fields
from models.analysis.summary import BATCH, NetworkSummary, Pixels
from models.analysis.trace import NETWORK_ITSELF, in_mode, trace

SHARES = (0.2, 0.5, 0.9, 0.99)  # of the energy, for `EffectiveField.sides`
WARNING_SHARE = 0.9  # of the energy: the square that is compared with the image
WARNING_SIDE = 1 / 3  # of the image's side: smaller squares cause a warning; training widens them (Luo et al., 3)


@dataclass(frozen=True, eq=False)
class EffectiveField:
    """How strongly each pixel influences the middle unit of a layer's map."""

    layer: str
    # (H, W), float64, CPU: the unit's squared gradient, summed over all channels, averaged over images, with sum 1.
    energy: Tensor
    center: Pixels  # of the unit's local receptive field, from the middle of the first pixel: .5 for even sizes
    num_images: int

    def side(self, share: float) -> int:
        """Side in pixels of the smallest square around the center that holds this share of the energy.

        A square of side s holds the pixels whose middle is at most (s - 1) / 2 from the center along both axes, and is
        cut at the borders of the image. Raises: ValueError for a share outside (0, 1].
        """
        if not 0 < share <= 1:
            raise ValueError(f"a share of {share} of the energy is not in (0, 1]")
        cumulative = torch.bincount(self._distances().flatten(), weights=self.energy.flatten()).cumsum(0)
        return int(torch.searchsorted(cumulative, share * cumulative[-1])) + 1

    @property
    def sides(self) -> dict[float, int]:
        """Sides in pixels of the squares for `SHARES` of the energy."""
        return {share: self.side(share) for share in SHARES}

    def area(self, share: float) -> float:
        """Share of the image's pixels in the square for this share of the energy: Ding et al.'s area ratio."""
        return float((self._distances() < self.side(share)).double().mean())

    def _distances(self) -> Tensor:
        """Distance of each pixel to the center along the farther axis, in half pixels, an integer: (H, W)."""
        middles = zip(self.energy.shape, self.center, strict=True)
        rows, columns = ((2 * torch.arange(size) - round(2 * middle)).abs() for size, middle in middles)
        return torch.maximum(rows[:, None], columns[None, :])


def effective_field(
    net: nn.Module, images: Tensor, *, layer: str | None = None, seed: int = 0, images_at_once: int = 4
) -> EffectiveField:
    """Measure on images (N, C, H, W) how strongly each pixel influences the middle unit of a map, in evaluation mode.

    The map is the output of `layer`, by default of the last module that returns one: (N, C', H', W') or
    (N, H', W', C') with a local receptive field. The middle of H' rows is row H' // 2.
    Channels c are summed with random signs s_c, drawn from `seed`: (sum_c s_c dy_c/dx)^2 is sum_c (dy_c/dx)^2 on
    average, so one backward replaces one per channel (Hutchinson's estimator of the diagonal of J'J).
    Raises: ValueError for images that are not float (N, C, H, W), for a layer without such a map, and for a unit that
    no pixel influences; TraceError and UnknownReceptiveField if the middle of the field is unknown.
    """
    if images.ndim != 4 or not images.is_floating_point() or not len(images):
        raise ValueError(f"images are a {images.dtype} tensor of {tuple(images.shape)}: give floats (N, C, H, W)")
    unit = _middle_unit(net, images.shape[1:], layer=layer)
    energy = torch.zeros(images.shape[2:], dtype=torch.float64)
    signs = torch.Generator().manual_seed(seed)
    like = next(net.parameters(), images)
    with in_mode(net, training=False), torch.enable_grad():
        for part in torch.split(images.detach(), images_at_once):
            pixels = part.to(like.device, like.dtype, copy=True).requires_grad_()  # also for inference-mode tensors
            values = _values(net, pixels, unit=unit)  # (N, C')
            signed = values * (2 * torch.randint(2, values.shape, generator=signs) - 1).to(values)
            (gradient,) = torch.autograd.grad(signed.sum(), pixels)
            energy += gradient.cpu().double().square().sum((0, 1))  # (N, C, H, W) -> (H, W)
    total = float(energy.sum())
    if not 0 < total < float("inf"):
        sums = f"the squared gradients of {unit.layer or NETWORK_ITSELF} sum to {total}"
        raise ValueError(f"{sums}: there is no effective field to measure")
    return EffectiveField(unit.layer, energy / total, unit.center, len(images))


def field_warnings(field: EffectiveField, summary: NetworkSummary) -> list[str]:
    """Warn if the receptive field is smaller than the image, or the square of 0.9 of the energy than a third of it."""
    _, height, width = summary.image_shape
    image, warnings = f"the image of {height} x {width} px", []
    last, first_global = summary.last_local_layer, summary.first_global_layer
    rows, columns = (last and last.local_size) or (height, width)
    if last is not None and (rows < height or columns < width):
        consequence = "no unit covers larger objects completely"
        if last.is_global and first_global is not None:
            consequence = f"the rest acts only through means, gates or attention, first in {first_global.location}"
        size = f"the receptive field of {rows:g} x {columns:g} px at {last.location}"
        warnings.append(f"{size} is smaller than {image}: {consequence}")
    side, layer = field.side(WARNING_SHARE), field.layer or NETWORK_ITSELF
    if side < WARNING_SIDE * min(height, width):
        share = f"{WARNING_SHARE:.0%} of the influence on {layer} lies in {side} x {side} px of {image}"
        warnings.append(f"{share}: pixels farther out hardly count (rule of thumb: less than a third of the side)")
    return warnings


class _Unit(NamedTuple):
    layer: str
    call: int  # number of the layer's call that returns the map
    entry: tuple[int | slice, ...]
    center: Pixels


def _middle_unit(net: nn.Module, image: tuple[int, ...], *, layer: str | None) -> _Unit:
    if layer not in (None, *(name for name, _ in net.named_modules())):
        raise ValueError(f"{type(net).__name__} has no layer {layer}: take a name from `net.named_modules()`")
    traced = trace(net, (BATCH, image[0], image[1], image[2]))
    # A tensor that is overwritten in place belongs to the last operation that wrote to it.
    fields = zip(traced.operations, receptive_fields(traced), strict=True)
    sources = {id(one.outputs[0]): (one.layer, axes) for one, axes in fields if axes is not None}
    for position, (name, output) in reversed(list(enumerate(traced.module_outputs))):
        source, axes = sources.get(id(output), (None, None))
        middle = _middle(axes, name) if axes is not None and name == (source if layer is None else layer) else None
        if middle is not None:
            call = sum(other == name for other, _ in traced.module_outputs[:position])
            return _Unit(name, call, *middle)
    kind = "(N, C, H, W) or (N, H, W, C) with a local receptive field"
    if layer is None:
        raise ValueError(f"no layer of {type(net).__name__} returns a map {kind}")
    raise ValueError(f"layer {layer} of {type(net).__name__} returns no map {kind}: name one that does")


def _middle(axes: TensorAxes, layer: str) -> tuple[tuple[int | slice, ...], Pixels] | None:
    """The entry of the middle unit of a map with four dimensions, and the middle of its field; None for others."""
    order = [[factor.axis for factor in dim if factor.size > 1 or factor.axis is not None] for dim in axes.dims]
    if not axes.has_local_field or len(order) != 4 or any(order[1:].count([axis]) != 1 for axis in AXES):
        return None
    entry: list[int | slice] = [slice(None)] * 4
    centers = []
    for axis, field in zip(AXES, axes.fields, strict=True):
        position = field.num_positions // 2
        interval = field.at(position)
        if interval is None:
            unit = f"{AXIS_NAMES[axis]} {position} of the map of {layer or NETWORK_ITSELF}"
            raise ValueError(f"{unit} read no pixel: name another `layer`")
        entry[order.index([axis])] = position
        centers.append(sum(interval) / 2)
    return tuple(entry), Pixels(*centers)


def _values(net: nn.Module, pixels: Tensor, *, unit: _Unit) -> Tensor:
    """The channels of a unit for each image: (N, C, H, W) -> (N, C')."""
    calls, values = itertools.count(), []

    def observe(output: Tensor) -> None:
        if next(calls) == unit.call:
            values.append(output[unit.entry].clone())  # a later layer may overwrite the map

    with net.get_submodule(unit.layer).register_forward_hook(lambda *hooked: observe(hooked[-1])):
        net(pixels.clone())  # the first layer may write to its input, which a leaf with gradient forbids
    return values[0]
