"""Everything that training does to an image: a crop, the operations of a policy, and erasing."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from data.augment.apply import Operations, apply_operations
from data.augment.crops import CropPolicy, CropWindows, height_and_width
from data.augment.erasing import Boxes, RandomErasing
from data.augment.policies import Policy
from data.draws import Samples


@dataclass(frozen=True)
class Augmentation:
    """A crop, then the operations of a policy, if any, then erasing, if any."""

    crop: CropPolicy
    policy: Policy | None = None
    erasing: RandomErasing | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return height_and_width(self.crop.image_size)

    def draw(self, sizes: NDArray[np.int64], samples: Samples, *, seed: int, epoch: int) -> "DrawnBatch":
        """Draw for a batch, a function of (seed, epoch, sample) alone. Shapes: sizes (N, 2), samples (N,)."""
        crops, operations, boxes = self.crop.crops(sizes, samples, seed=seed, epoch=epoch), None, None
        if self.policy is not None:
            operations = self.policy.draw(samples, size=self.size, seed=seed, epoch=epoch)
        if self.erasing is not None:
            boxes = self.erasing.draw(samples, size=self.size, seed=seed, epoch=epoch)
        return DrawnBatch(self, crops, operations, boxes, samples, seed, epoch)


@dataclass(frozen=True)
class DrawnBatch:
    """The draws for the samples of a batch; the methods work in place."""

    augment: Augmentation
    crops: CropWindows
    operations: Operations | None
    boxes: Boxes | None
    samples: Samples
    seed: int
    epoch: int

    def apply_operations(self, images: Tensor) -> None:
        """Apply the policy's operations to uint8 images (N, H, W, 3) on any device."""
        if self.augment.policy is not None and self.operations is not None:
            apply_operations(images, self.operations, fill=self.augment.policy.fill)

    def erase(self, images: Tensor) -> None:
        """Erase the rectangles of normalised images (N, 3, H, W) on any device."""
        if self.augment.erasing is not None and self.boxes is not None:
            self.augment.erasing.erase(images, self.boxes, samples=self.samples, seed=self.seed, epoch=self.epoch)
