"""The effective receptive field: how much each pixel moves a unit, of all the pixels that could.

Luo, Li, Urtasun & Zemel 2016, "Understanding the effective receptive field in deep convolutional neural networks". Of
n layers with random weights it grows with the square root of n, the receptive field with n: most of a large field does
next to nothing. Its size is told in squares, as by Ding et al. 2022, "Scaling up your kernels to 31x31", section 5.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.analysis.axes import AXES, COLUMNS, NAMES, ROWS, Sight
from models.analysis.receptive_field import receptive_fields
from models.analysis.summary import BATCH, Inspection, Pixels
from models.analysis.trace import ITSELF, in_evaluation, trace

SHARES = (0.2, 0.5, 0.9, 0.99)  # of the energy, for which sides are told
MOST = 0.9  # of the energy: the square that is compared with the image
SMALL = 1 / 3  # of the image's side; a smaller square is warned of


@dataclass(frozen=True, eq=False)
class EffectiveField:
    """How much each pixel moves the middle unit of a layer's map.

    `energy` (H, W), float64 on the CPU, is the squared gradient of all channels of the unit with respect to all
    colours of the pixel, averaged over `num_images` images and scaled to a sum of 1. `center` is the middle of what
    the unit sees through windows, in pixels from the middle of the first, so that it ends in .5 for an even field.
    """

    layer: str
    energy: Tensor
    center: Pixels
    num_images: int

    def side(self, share: float) -> int:
        """The side in pixels of the smallest square around the center that holds this share of the energy.

        A pixel lies in the square of side s if, along both axes, its middle is at most (s - 1) / 2 from the center.
        So sides are odd around a pixel, even around a corner between four, and either around an edge between two.
        Squares are cut at the borders of the image. One larger than the image reaches over the border that is near
        the center, to take in what lies at the one that is far.
        Raises: ValueError for a share outside (0, 1].
        """
        if not 0 < share <= 1:
            raise ValueError(f"no square holds a share of {share} of the energy: give one above 0 and up to 1")
        within = torch.bincount(self._distances().flatten(), weights=self.energy.flatten()).cumsum(0)
        return int(torch.searchsorted(within, share * within[-1])) + 1

    def area(self, share: float) -> float:
        """The share of the image's pixels that lie in the square of this share of the energy.

        What Ding et al. 2022 call the high-contribution area ratio, but of squared gradients, and of a cut square.
        """
        return float((self._distances() < self.side(share)).double().mean())

    @property
    def sides(self) -> dict[float, int]:
        """Sides in pixels of the squares for `SHARES` of the energy."""
        return {share: self.side(share) for share in SHARES}

    def _distances(self) -> Tensor:
        """From each pixel to the center along the farther axis, in half pixels, which are whole: (H, W)."""
        rows, columns = (
            (2 * torch.arange(count) - round(2 * middle)).abs()
            for count, middle in zip(self.energy.shape, self.center, strict=True)
        )
        return torch.maximum(rows[:, None], columns[None, :])


def effective_field(
    net: nn.Module, images: Tensor, *, layer: str | None = None, seed: int = 0, images_at_once: int = 4
) -> EffectiveField:
    """Measure on images (N, C, H, W) how much each pixel moves the unit in the middle of a map, in evaluation.

    The map is that of the last module which puts one out, as (N, C', H', W') or (N, H', W', C'), that is reached
    through windows; of `layer` where one is named. The middle of H' rows is row H' // 2, that of columns likewise.

    Gradients of channels may cancel in their sum, so each channel c and image has a random sign s_c, seeded. Over
    signs, (sum_c s_c dy_c/dx)^2 is sum_c (dy_c/dx)^2 on average, since every mixed term s_b s_c averages to 0: one
    run backwards stands for one per channel (Hutchinson's estimator of the diagonal of J'J).

    Nothing is left behind in the network, nor drawn from torch's own generator. Images go where the parameters
    are, in their type.
    Raises: ValueError for a layer that puts out no such map, or that no pixel moves; Untraceable and
    UnknownReceptiveField where the middle of the field is not known.
    """
    if images.ndim != 4 or not images.is_floating_point() or not len(images):
        raise ValueError(f"images are a {images.dtype} tensor of {tuple(images.shape)}: give floats (N, C, H, W)")
    unit = _middle_unit(net, images.shape[1:], layer=layer)
    energy = torch.zeros(images.shape[2:], dtype=torch.float64)
    signs = torch.Generator().manual_seed(seed)
    like = next(net.parameters(), images)
    with in_evaluation(net), torch.enable_grad():
        for some in torch.split(images.detach(), images_at_once):
            pixels = some.to(like.device, like.dtype, copy=True).requires_grad_()  # those of inference mode could not
            values = _values(net, pixels, unit=unit)  # (N, C')
            signed = values * (2 * torch.randint(2, values.shape, generator=signs) - 1).to(values)
            (gradient,) = torch.autograd.grad(signed.sum(), pixels)
            energy += gradient.cpu().double().square().sum((0, 1))  # (N, C, H, W) -> (H, W)
    total = float(energy.sum())
    if not 0 < total < float("inf"):
        where = unit.layer or ITSELF
        raise ValueError(f"the squared gradients of {where} come to {total} over all pixels: there is no field to see")
    return EffectiveField(unit.layer, energy / total, unit.center, len(images))


def warnings_about(field: EffectiveField, inspection: Inspection) -> list[str]:
    """A sentence for each reason to fear that the network sees too little of its images; `inspection` is of the same.

    Either the receptive field is smaller than the image, or the square of 0.9 of the energy is less than a third of it.
    The third is a rule of thumb, and says little of a fresh network: training widens its square (section 3).
    """
    _, height, width = inspection.image
    image = f"the image of {height} x {width} px"
    last, whole, said = inspection.last_window, inspection.first_whole, []
    if last is not None and last.window is not None:
        rows, columns = last.window.size
        if rows < height or columns < width:
            beyond = "objects larger than it are seen only in parts"
            if last.whole and whole is not None:
                beyond = f"the rest comes only by means, gates or attention, first in {whole.place}"
            said.append(
                f"the receptive field of {rows:g} x {columns:g} px at {last.place} is smaller than {image}: {beyond}"
            )
    side = field.side(MOST)
    if side < SMALL * min(height, width):
        said.append(
            f"{MOST:.0%} of what moves {field.layer or ITSELF} lies in {side} x {side} px of {image}: "
            "pixels farther out hardly count"
        )
    return said


class _Unit(NamedTuple):
    """The unit in the middle of a map: in which call of a layer it comes out, where in that output, and its center."""

    layer: str
    call: int
    place: tuple[int | slice, ...]
    center: Pixels


def _middle_unit(net: nn.Module, image: tuple[int, ...], *, layer: str | None) -> _Unit:
    names = [name for name, _ in net.named_modules()]
    if layer not in (None, *names):
        raise ValueError(f"{type(net).__name__} has no layer {layer}: take one that `inspect` names")
    calls: list[tuple[str, object]] = []
    with _watching(net, names, note=lambda name, output: calls.append((name, output))):
        traced = trace(net, (BATCH, image[0], image[1], image[2]))
    # What is overwritten in place is of the last operation that did.
    made = {
        id(operation.outputs[0]): (operation.layer, sight)
        for operation, sight in zip(traced.operations, receptive_fields(traced), strict=True)
        if sight is not None
    }
    for position, (name, output) in reversed(list(enumerate(calls))):
        maker, sight = made.get(id(output), (None, None))
        dims = _map_dims(sight) if sight is not None and name == (maker if layer is None else layer) else None
        if sight is not None and dims is not None:
            call = sum(other == name for other, _ in calls[:position])
            place: list[int | slice] = [slice(None)] * 4
            for axis, dim in zip(AXES, dims, strict=True):
                place[dim] = sight.axes[axis].count // 2
            return _Unit(name, call, tuple(place), Pixels(*(_middle(sight, axis, layer=name) for axis in AXES)))
    raise ValueError(
        f"{'no layer' if layer is None else layer} of {type(net).__name__} puts out a map (N, C, H, W) or (N, H, W, C) "
        "that is reached through windows: name one that does as `layer`"
    )


def _map_dims(sight: Sight) -> tuple[int, int] | None:
    """The dimensions of rows and columns in a map of four that is reached through windows."""
    axes = [[part.axis for part in dim if part.size > 1 or part.axis is not None] for dim in sight.dims]
    whole_map = sight.local and len(axes) == 4 and all(axes[1:].count([axis]) == 1 for axis in AXES)
    return (axes.index([ROWS]), axes.index([COLUMNS])) if whole_map else None


def _middle(sight: Sight, axis: int, *, layer: str) -> float:
    """The middle of what the unit in the middle reads, in pixels."""
    field, place = sight.axes[axis].field, sight.axes[axis].count // 2
    interval = field.at(place) if field is not None else None
    if interval is None:
        raise ValueError(
            f"of the map that {layer or ITSELF} puts out, {NAMES[axis]} {place} read no pixel: name another `layer`"
        )
    return sum(interval) / 2


def _values(net: nn.Module, pixels: Tensor, *, unit: _Unit) -> Tensor:
    """The channels of a unit for each image: (N, C, H, W) -> (N, C')."""
    calls, values = itertools.count(), []

    def note(_: str, output: object) -> None:
        if next(calls) == unit.call:
            assert isinstance(output, Tensor)
            values.append(output[unit.place].clone())  # before a later layer overwrites the map

    with _watching(net, [unit.layer], note=note):
        net(pixels.clone())  # which the first layer may overwrite, unlike what gradients are asked for
    return values[0]


@contextmanager
def _watching(net: nn.Module, names: Iterable[str], *, note: Callable[[str, object], None]) -> Iterator[None]:
    """Tell of each call of these modules what it puts out, when it ends."""

    def telling(name: str) -> Callable[[nn.Module, object, object], None]:
        return lambda _layer, _inputs, output: note(name, output)

    with ExitStack() as hooks:
        for name in names:
            hooks.callback(net.get_submodule(name).register_forward_hook(telling(name)).remove)
        yield
