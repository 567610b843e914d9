"""Random erasing: a rectangle of a normalised image becomes noise or its mean colour.

Zhong et al. 2020. Rectangles are torchvision's RandomErasing; like timm's, the noise has a number for every pixel.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.arguments import require, require_probability, require_ranges
from data.augment.crops import ATTEMPTS, draw_rectangles
from data.draws import ERASE, NOISE, Samples, key, uniform

FILLS = ("pixel", "constant")
TABLE = 2**20  # numbers of noise: more than the pixels of any rectangle of common images
Boxes = NDArray[np.int64]  # (N, 4) top, left, height and width in pixels; a height of 0 erases nothing


@dataclass(frozen=True)
class RandomErasing:
    """Erase a rectangle with `probability`, of a share of the area in `scale` and with height / width in `ratio`.

    `fill` is "pixel" for noise from N(0, 1) in normalised units, or "constant" for 0, the data set's mean colour.
    Raises: ValueError for impossible values.
    """

    probability: float = 0.25
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)
    fill: str = "pixel"

    def __post_init__(self) -> None:
        require_probability(probability=self.probability)
        require(self.fill in FILLS, f"is not one of {', '.join(FILLS)}", fill=self.fill)
        require_ranges(scale=self.scale, ratio=self.ratio)

    def draw(self, samples: Samples, *, size: tuple[int, int], seed: int, epoch: int) -> Boxes:
        """Draw a rectangle per image of `size`, height and width: (N,) -> (N, 4)."""
        draws = uniform(samples, 4 * ATTEMPTS + 1, seed=seed, epoch=epoch, purpose=ERASE)
        sizes = np.tile(size, (len(samples), 1))
        ratio = (1 / self.ratio[1], 1 / self.ratio[0])  # width / height
        # Rectangles are smaller than the image, as torchvision's.
        found = draw_rectangles(sizes, draws[:, :-1], scale=self.scale, ratio=ratio, largest=sizes - 1)
        is_erased = found.fits & (draws[:, -1] < self.probability)
        return np.where(is_erased[:, None], np.concatenate([found.anchor, found.shape], axis=1), 0)

    def erase(self, images: Tensor, boxes: Boxes, *, samples: Samples, seed: int, epoch: int) -> None:
        """Erase the rectangles in place: images (N, 3, H, W), normalised, on any device.

        The noise is a function of (seed, epoch, sample): a part of a table, from a place that is drawn.
        """
        largest = 3 * int((boxes[:, 2] * boxes[:, 3]).max(initial=0))
        for number in np.flatnonzero(boxes[:, 2]).tolist():
            top, left, height, width = boxes[number].tolist()
            box = images[number, :, top : top + height, left : left + width].permute(1, 2, 0)  # (height, width, 3)
            if self.fill == "constant":
                _fill(box, torch.zeros((), device=images.device))
                continue
            start = int(key(NOISE, seed, epoch, int(samples[number])) % np.uint64(TABLE))
            noise = _noise(images.device, repeats=2 + largest // TABLE)  # enough numbers follow every place
            _fill(box, noise[start : start + box.numel()].view(box.shape))


def _fill(box: Tensor, values: Tensor) -> None:
    if box.device.type == "cpu":
        np.copyto(box.numpy(), values.numpy())  # torch wakes further threads, which cost ten times as much
    else:
        box.copy_(values)


@lru_cache(maxsize=8)
def _noise(device: torch.device, *, repeats: int) -> Tensor:
    """Return the table several times, one after another: numbers from N(0, 1), the same on every device."""
    table = np.random.Generator(np.random.PCG64(0)).standard_normal(TABLE, np.float32)
    return torch.from_numpy(table).to(device).repeat(repeats)
