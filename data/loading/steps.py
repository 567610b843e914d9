"""Steps of the DALI graph that torch or OpenCV computes on a CPU, each on several threads."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # it has no stubs
from torch import Tensor

from data.augment.apply import Operations, apply_operations
from data.augment.geometry import Fill
from data.augment.opencv import copy_image

PART = 2**20  # bytes of images, at least, that a thread is given: each part costs some Python

Images = Sequence[NDArray[np.uint8]]  # (h, w, 3) each


class _Parts:
    """Threads that share the images of a batch, and memory for their results.

    The memory is reused for every batch, because DALI copies the result: fresh memory would cost as much as the work.
    """

    def __init__(self, shape: tuple[int, int, int, int], *, threads: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=_work_alone)
        self.results = torch.empty(shape, dtype=torch.uint8)  # (N, H, W, 3)

    def run(self, work: Callable[[range], None], images: Images) -> list[NDArray[np.uint8]]:
        """Call `work` with the numbers of some images each, and return views of the results."""
        count = len(images)
        step = max(1, PART * count // sum(image.size for image in images))
        parts = [range(start, min(start + step, count)) for start in range(0, count, step)]
        list(self._threads.map(work, parts))  # waits for all, raises what one has raised
        return list(self.results[:count].numpy())


class TorchResize:
    """torch's antialiased resize: torchvision's v2 Resize to the bit.

    DALI's own resize stays within a level of it except at the border, where it repeats the last pixel, and takes as
    long as decoding on a CPU (benchmarks/README.md). Shapes: uint8 (h, w, 3), any sizes -> (H, W, 3).
    """

    def __init__(self, batch_size: int, size: tuple[int, int], *, threads: int) -> None:
        self._parts = _Parts((batch_size, *size, 3), threads=threads, name="resize")

    def __call__(self, images: Images) -> list[NDArray[np.uint8]]:
        """Resize a batch of at most `batch_size` images."""
        if all(image.shape[:2] == self._parts.results.shape[1:3] for image in images):
            return list(images)
        return self._parts.run(partial(self._resize, images=images), images)

    def _resize(self, numbers: range, *, images: Images) -> None:
        results = self._parts.results
        for number in numbers:
            image = _planes(torch.from_numpy(images[number])[None])  # no copy
            resized, size = _planes(results[number : number + 1]), list(results.shape[1:3])
            # functional.interpolate calls this too, but has no `out`.
            torch.ops.aten._upsample_bilinear2d_aa.out(image, size, align_corners=False, out=resized)


class PolicyOperations:
    """Mirror, then the operations of a policy: uint8 (H, W, 3), mirror (), codes and magnitudes (S,) -> (H, W, 3)."""

    def __init__(self, batch_size: int, size: tuple[int, int], *, fill: Fill, threads: int) -> None:
        self._parts, self._fill = _Parts((batch_size, *size, 3), threads=threads, name="augment"), fill

    def __call__(
        self, images: Images, mirror: Sequence[NDArray[Any]], *drawn: Sequence[NDArray[Any]]
    ) -> list[NDArray[np.uint8]]:
        """Change a batch of at most `batch_size` images: mirror those of 1, then apply codes and magnitudes."""
        operations = Operations(*map(np.stack, drawn))
        change = partial(self._change, images=images, mirror=np.stack(mirror), operations=operations)
        return self._parts.run(change, images)

    def _change(self, numbers: range, *, images: Images, mirror: NDArray[np.int32], operations: Operations) -> None:
        part = slice(numbers.start, numbers.stop)
        changed = self._parts.results[part]
        for image, is_mirrored, place in zip(images[part], mirror[part].tolist(), changed.numpy(), strict=True):
            copy_image(image, place, mirror=bool(is_mirrored))
        apply_operations(changed, Operations(operations.codes[part], operations.magnitudes[part]), fill=self._fill)


def _work_alone() -> None:
    """Let torch use no further threads below this one: they would wait for each other in a loop."""
    torch.get_num_threads()  # sets this thread's number, once
    threadpool_limits(1, user_api="openmp")


def _planes(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2)  # (N, h, w, 3) -> (N, 3, h, w)
