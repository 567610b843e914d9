"""Mixup and CutMix: batches whose images, and labels, are mixtures of two.

Zhang et al. 2018; Yun et al. 2019. One ratio serves a batch, as in the code of both papers. Options are timm's, and so
are the draws: a NumPy generator in the same state gives timm's `Mixup` the same ratios and boxes. Each image is mixed
with the one before it, as in torchvision's `MixUp`: the order of a batch is random already.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.arguments import require
from models.learning.losses import one_hot


class Mix(NamedTuple):
    """How the images of one batch are mixed: `lam` is the weight of an image's own label.

    CutMix fills `box`, rows and columns in pixels, from the partner, and `lam` is the area that is left.
    """

    lam: float
    box: tuple[slice, slice] | None = None


def cut_box(lam: float, *, height: int, width: int, row: int, column: int) -> Mix:
    """Return a box around a pixel, whose sides are sqrt(1 - lam) of the image's before its edges cut the box.

    Yun et al. 2019, section 3.1. The ratio of the result is the exact area.
    """
    ratio = math.sqrt(1 - lam)
    rows = _side(row, int(height * ratio), limit=height)
    columns = _side(column, int(width * ratio), limit=width)
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return Mix(1 - area / (height * width), (rows, columns))


def _side(center: int, length: int, *, limit: int) -> slice:
    return slice(max(center - length // 2, 0), min(center + (length + 1) // 2, limit))


def mix_images(images: Tensor, mix: Mix) -> Tensor:
    """Mix each image with the one before it. Shapes: (N, C, H, W) -> (N, C, H, W), in the same memory format."""
    if mix.box is None:
        return images.lerp(_partners(images), 1 - mix.lam)
    mixed = images.clone()
    mixed[..., *mix.box] = _partners(images[..., *mix.box])
    return mixed


def mix_labels(labels: Tensor, mix: Mix, *, num_classes: int) -> Tensor:
    """Return the probability of each class in the mixed images. Shapes: int64 (N,) -> (N, K)."""
    probabilities = one_hot(labels, num_classes)
    return probabilities.lerp(_partners(probabilities), 1 - mix.lam)


def _partners(batch: Tensor) -> Tensor:
    return torch.cat([batch[-1:], batch[:-1]])  # which keeps the memory format


@dataclass(frozen=True)
class Mixing:
    """Which batches of a training are mixed, and how.

    A batch is mixed with `probability`, by mixup or by CutMix, with ratios from Beta(alpha, alpha); an alpha of 0 turns
    one of them off. With both on, `switch_probability` is that of CutMix. `off_epoch` epochs are mixed and those after
    them are not; a negative number counts the epochs that are not, at the end; None mixes all.
    Raises: ValueError for impossible values.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    probability: float = 1.0
    switch_probability: float = 0.5
    off_epoch: int | None = None

    def __post_init__(self) -> None:
        alphas = {"mixup_alpha": self.mixup_alpha, "cutmix_alpha": self.cutmix_alpha}
        for name, value in alphas.items():
            require(_is_number(value), "must be a number of at least 0, which is off", **{name: value})
        rule = "is off, and so is mixup_alpha: one of them must be above 0"
        require(any(alphas.values()), rule, cutmix_alpha=self.cutmix_alpha)
        for name in ("probability", "switch_probability"):
            value = getattr(self, name)
            require(_is_number(value, most=1), "must be a number from 0 to 1", **{name: value})
        off = self.off_epoch
        is_epoch = off is None or (isinstance(off, int) and not isinstance(off, bool) and off != 0)
        rule = "must be a number of epochs: 20 mixes the first 20, -20 all but the last 20, null all"
        require(is_epoch, rule, off_epoch=off)

    def count_epochs(self, num_epochs: int) -> int:
        """Return how many epochs of a training are mixed; they are the first ones."""
        off = num_epochs if self.off_epoch is None else self.off_epoch
        return min(off, num_epochs) if off > 0 else max(num_epochs + off, 0)

    def draw(self, key: int, *, height: int, width: int) -> Mix | None:
        """Draw how a batch of images of this size is mixed, a function of a 64-bit key; None: not at all."""
        # Of NumPy's generators, the one whose distributions never change (NEP 19): a resumed training needs them.
        generator = np.random.RandomState(np.random.Philox(key=key))
        if generator.random_sample() >= self.probability:
            return None
        has_both = self.mixup_alpha > 0 and self.cutmix_alpha > 0
        cuts = generator.random_sample() < self.switch_probability if has_both else self.cutmix_alpha > 0
        alpha = self.cutmix_alpha if cuts else self.mixup_alpha
        lam = generator.beta(alpha, alpha)
        if not cuts:
            return Mix(lam)
        row, column = generator.randint(height), generator.randint(width)
        return cut_box(lam, height=height, width=width, row=row, column=column)

    def mix_batch(self, images: Tensor, labels: Tensor, *, num_classes: int, key: int) -> tuple[Tensor, Tensor]:
        """Mix a batch as `draw` says. The host does not wait for the device.

        Shapes: (N, C, H, W), int64 (N,) -> (N, C, H, W), probabilities (N, K), or both as they are.
        """
        mix = self.draw(key, height=images.shape[-2], width=images.shape[-1])
        if mix is None:
            return images, labels
        return mix_images(images, mix), mix_labels(labels, mix, num_classes=num_classes)

    def describe(self, num_epochs: int) -> str:
        """Describe the mixing of a training in one line."""
        mixup, cutmix = f"mixup (alpha {self.mixup_alpha:g})", f"CutMix (alpha {self.cutmix_alpha:g})"
        both = f"{mixup} or, with a probability of {self.switch_probability:g}, {cutmix}"
        kinds = both if self.mixup_alpha and self.cutmix_alpha else mixup if self.mixup_alpha else cutmix
        batches = "" if self.probability == 1 else f" of {self.probability:g} of the batches"
        mixed = self.count_epochs(num_epochs)
        epochs = "" if mixed == num_epochs else f" in the first {mixed} of {num_epochs} epochs"
        return f"{kinds}{batches}{epochs}; train/top1 weighs the two labels of an image"


def _is_number(value: object, *, most: float = math.inf) -> bool:
    is_number = not isinstance(value, bool)
    return isinstance(value, int | float) and is_number and math.isfinite(value) and 0 <= value <= most
