"""From encoded images to normalised batches: one DALI graph for CPU and GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types

from data.loading.crops import CropPolicy

Resizer = Literal["torch", "dali"]


@dataclass(frozen=True)
class DecodeSettings:
    """How batches are read and decoded; `mean` and `std` are fractions of 255, `device_id` is a GPU, None the CPU."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device_id: int | None = None
    threads: int = 2  # of DALI, on the CPU
    readahead: int = 4  # batches that are read before they are needed

    @property
    def device(self) -> str:
        """DALI's device for decoders; "mixed" uses the hardware decoder if the GPU has one."""
        return "cpu" if self.device_id is None else "mixed"


def choose_resizer(decode: DecodeSettings, crop: CropPolicy) -> Resizer:
    """Choose torch on a CPU, where it is a third cheaper, unless the crop has a margin, which only DALI supports."""
    return "torch" if decode.device_id is None and not crop.has_margin else "dali"


def build_pipeline(
    source: Callable[[], tuple[Any, ...]],
    *,
    decode: DecodeSettings,
    crop: CropPolicy,
    batch_size: int,
    resizer: Resizer,
) -> Pipeline:
    """Build the graph: decode a rectangle, resize the crop in it, mirror, normalise to float32 (N, H, W, 3).

    `source` returns a list of encoded images, then the arrays of their `CropWindows`.
    """
    # exec_dynamic: the other executor overwrites batches that are still referenced.
    threads, device_id = decode.threads, decode.device_id
    with Pipeline(batch_size=batch_size, num_threads=threads, device_id=device_id, exec_dynamic=True) as pipeline:
        encoded, anchor, shape, mirror, *region = fn.external_source(
            source=source, num_outputs=6 if crop.has_margin else 4, batch=True, no_copy=True
        )
        decoded = fn.decoders.image_slice(
            encoded, anchor, shape, axis_names="HW", device=decode.device, output_type=types.DALIImageType.RGB
        )
        if resizer == "torch":
            resize = _TorchResize(batch_size, crop.image_size)
            resized = fn.python_function(decoded, function=resize, batch_processing=True, output_layouts="HWC")
        else:
            size, linear = [crop.image_size] * 2, types.DALIInterpType.INTERP_LINEAR
            part = dict(zip(("roi_start", "roi_end"), region, strict=False))  # empty without a margin
            resized = fn.resize(decoded, size=size, interp_type=linear, antialias=True, **part)
        mean, std = [value * 255 for value in decode.mean], [value * 255 for value in decode.std]
        images = fn.crop_mirror_normalize(
            resized, mirror=mirror, mean=mean, std=std, dtype=types.DALIDataType.FLOAT, output_layout="HWC"
        )
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


class _TorchResize:
    """torch's antialiased resize as a step of the graph on a CPU: torchvision's v2 Resize to the bit.

    DALI's own resize stays within a level of it except at the border, where it repeats the last pixel, and takes as
    long as decoding on a CPU (benchmarks/README.md). Shapes: uint8 (h, w, 3), any sizes -> (image_size, image_size, 3).
    """

    def __init__(self, batch_size: int, image_size: int) -> None:
        # Reused for every batch, because DALI copies the result: fresh memory would cost as much as the resize.
        shape = (batch_size, 3, image_size, image_size)
        self._resized = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)

    def __call__(self, images: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        size = list(self._resized.shape[2:])
        for number, array in enumerate(images):
            image = torch.from_numpy(array).permute(2, 0, 1)[None]  # (h, w, 3) -> (1, 3, h, w), no copy
            resized = self._resized[number : number + 1]
            # functional.interpolate calls this too, but has no `out`.
            torch.ops.aten._upsample_bilinear2d_aa.out(image, size, align_corners=False, out=resized)
        return list(self._resized[: len(images)].permute(0, 2, 3, 1).numpy())  # (N, 3, H, W) -> (N, H, W, 3), views


def can_decode(encoded: NDArray[np.uint8], decode: DecodeSettings) -> bool:
    """Try to decode one image with DALI."""
    with Pipeline(batch_size=1, num_threads=1, device_id=decode.device_id) as pipeline:
        source = fn.external_source(source=lambda: [encoded], batch=True)
        pipeline.set_outputs(fn.decoders.image(source, device=decode.device, output_type=types.DALIImageType.RGB))
    try:
        pipeline.run()
    except RuntimeError:
        return False
    return True
