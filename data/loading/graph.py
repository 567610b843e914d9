"""From encoded images to normalised batches: one DALI graph for CPU and GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types

from data.loading.crops import View


@dataclass(frozen=True)
class Decode:
    """How batches are made: mean and standard deviation as fractions of 255, and where.

    `device_id` is the GPU that decodes, None the CPU; `threads` are DALI's;
    `readahead` batches are fetched before they are asked for.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device_id: int | None = None
    threads: int = 2
    readahead: int = 4

    @property
    def device(self) -> str:
        """What DALI calls the place of its decoder; "mixed" takes the hardware decoder where there is one."""
        return "cpu" if self.device_id is None else "mixed"


def build_pipeline(source: Callable[[], tuple[Any, ...]], *, decode: Decode, view: View, batch_size: int) -> Pipeline:
    """The graph: decode a window, resize the region shown, mirror, normalise.

    `source` returns a list of encoded images, then what the view's `Windows` hold;
    the output is float32 (N, H, W, 3).
    """
    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=decode.threads,
        device_id=decode.device_id,
        exec_dynamic=True,  # the other executor writes over batches that are still held
    )
    with pipeline:
        encoded, anchor, shape, mirror, *region = fn.external_source(
            source=source, num_outputs=6 if view.has_margin else 4, batch=True, no_copy=True
        )
        decoded = fn.decoders.image_slice(
            encoded, anchor, shape, axis_names="HW", device=decode.device, output_type=types.DALIImageType.RGB
        )
        if decode.device_id is None and not view.has_margin:
            resize = TorchResize(batch_size, view.image_size)
            resized = fn.python_function(decoded, function=resize, batch_processing=True, output_layouts="HWC")
        else:
            size, linear = [view.image_size, view.image_size], types.DALIInterpType.INTERP_LINEAR
            region_of = dict(zip(("roi_start", "roi_end"), region, strict=False))
            resized = fn.resize(decoded, size=size, interp_type=linear, antialias=True, **region_of)
        images = fn.crop_mirror_normalize(
            resized,
            mirror=mirror,
            mean=[value * 255 for value in decode.mean],
            std=[value * 255 for value in decode.std],
            dtype=types.DALIDataType.FLOAT,
            output_layout="HWC",
        )
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


class TorchResize:
    """torch's antialiased resize of whole images, as a step of the graph on a CPU.

    To the bit what torchvision's v2 Resize makes of a tensor. DALI's own, which runs on
    GPUs, stays within a level of it except at the border, where it repeats the last
    pixel, and on a CPU it takes as long as the decoding (benchmarks/README.md).

    Shapes: arrays (h, w, 3) of uint8, each of its own size -> (image_size, image_size, 3) each.
    """

    def __init__(self, batch_size: int, image_size: int) -> None:
        # Written again and again, because DALI copies what it is given: fresh memory would cost as much as the resize.
        self._resized = torch.empty(
            (batch_size, 3, image_size, image_size), dtype=torch.uint8, memory_format=torch.channels_last
        )

    def __call__(self, images: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        """Resize a batch."""
        size = list(self._resized.shape[2:])
        for number, image in enumerate(images):
            whole = torch.from_numpy(image).permute(2, 0, 1)[None]  # (h, w, 3) -> (1, 3, h, w), no copy
            resized = self._resized[number : number + 1]
            # What functional.interpolate calls, which cannot be told where to write.
            torch.ops.aten._upsample_bilinear2d_aa.out(whole, size, align_corners=False, out=resized)
        return list(self._resized[: len(images)].permute(0, 2, 3, 1).numpy())  # (N, 3, H, W) -> (N, H, W, 3), views


def can_decode(encoded: NDArray[np.uint8], device_id: int | None) -> bool:
    """Whether DALI takes these bytes for an image, by trying."""
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=device_id)
    device = "cpu" if device_id is None else "mixed"
    with pipeline:
        source = fn.external_source(source=lambda: [encoded], batch=True)
        pipeline.set_outputs(fn.decoders.image(source, device=device, output_type=types.DALIImageType.RGB))
    try:
        pipeline.run()
    except RuntimeError:
        return False
    return True
