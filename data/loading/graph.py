"""From encoded images to batches: one DALI graph for every combination of decoder and device."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
import torch.utils.dlpack
from numpy.typing import NDArray
from nvidia.dali import OperatorConcurrency, Pipeline, fn, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.tensors import TensorGPU, TensorListCPU, TensorListGPU
from torch import Tensor

from data.augment.augmentation import Augmentation
from data.augment.crops import MEAN_COLOUR, CropPolicy, CropWindows
from data.loading.decoder import DecodeSettings, GpuDecoder
from data.loading.steps import PolicyOperations, TorchResize

Resizer = Literal["torch", "dali"]
PLAIN = CropWindows._fields[:3]  # of crops without a margin or padding


def choose_resizer(decode: DecodeSettings, crop: CropPolicy) -> Resizer:
    """Choose torch on a CPU, where it is a third cheaper, except for crops with a margin or padding."""
    return "torch" if decode.graph_device is None and _arrays_of(crop) == PLAIN else "dali"


def _arrays_of(crop: CropPolicy) -> tuple[str, ...]:
    """Return the names of the arrays of a crop's windows."""
    windows = crop.crops(np.ones((1, 2), np.int64), np.zeros(1, np.int64), seed=0, epoch=0)
    return tuple(name for name, array in windows._asdict().items() if array is not None)


def build_pipeline(
    source: Callable[[], tuple[Any, ...]],
    *,
    decode: DecodeSettings,
    augment: Augmentation,
    batch_size: int,
) -> Pipeline:
    """Build the graph: decode a rectangle, resize its part, mirror, change, normalise to float32 (N, H, W, 3).

    With `decode.crops_only` it ends at the mirror, with uint8. `source` returns a list of encoded images, then the
    arrays of their `CropWindows`; then, with a policy and without `crops_only`, those of its `Operations`.
    """
    arrays, has_policy = _arrays_of(augment.crop), augment.policy is not None and not decode.crops_only
    # exec_dynamic: the other executor overwrites batches that are still referenced. FULL: a batch is decoded while the
    # one before it is resized.
    with Pipeline(
        batch_size=batch_size,
        num_threads=decode.threads,
        device_id=decode.graph_device,
        prefetch_queue_depth=decode.prefetch,
        exec_dynamic=True,
        concurrency=OperatorConcurrency.FULL,
    ) as pipeline:
        num_outputs = 1 + len(arrays) + (2 if has_policy else 0)
        encoded, *inputs = fn.external_source(source=source, num_outputs=num_outputs, batch=True, no_copy=True)
        windows, operations = dict(zip(arrays, inputs, strict=False)), inputs[len(arrays) :]
        anchor, shape, mirror = (windows[name] for name in PLAIN)
        # Headers are parsed first: a decoder that meets one it cannot parse ends the process with SIGSEGV now and then.
        zero = 0 * fn.peek_image_shape(encoded, dtype=types.DALIDataType.INT32)[0]
        if decode.gpu_decoder is None or decode.gpu_decoder.regions:
            anchor += zero  # the decoder waits for it
        else:
            encoded += fn.cast(zero, dtype=types.DALIDataType.UINT8)
        decoded = decode_crops(encoded, (anchor, shape), decoder=decode.gpu_decoder)
        resized = _resize(decoded, windows, augment=augment, decode=decode, batch_size=batch_size)
        if decode.crops_only:
            output = mirror_images(resized, mirror, on_gpu=decode.graph_device is not None)
        elif augment.policy is not None:
            change = PolicyOperations(batch_size, augment.size, fill=augment.policy.fill, threads=decode.threads)
            changed = fn.python_function(
                resized, mirror, *operations, function=change, batch_processing=True, output_layouts="HWC"
            )
            output = _normalize(changed, None, decode=decode)
        else:
            output = _normalize(resized, mirror, decode=decode)
        pipeline.set_outputs(output)
    pipeline.build()
    return pipeline


def _resize(
    images: DataNode,
    windows: Mapping[str, DataNode],
    *,
    augment: Augmentation,
    decode: DecodeSettings,
    batch_size: int,
) -> DataNode:
    """Resize the decoded rectangles, or the part of each, and pad it: uint8 (h, w, 3) -> (H, W, 3)."""
    if choose_resizer(decode, augment.crop) == "torch":
        resize = TorchResize(batch_size, augment.size, threads=decode.threads)
        return fn.python_function(images, function=resize, batch_processing=True, output_layouts="HWC")
    options = {name: windows[name] for name in ("roi_start", "roi_end") if name in windows}
    options |= {"interp_type": types.DALIInterpType.INTERP_LINEAR, "antialias": True}
    if "resized" not in windows:
        return fn.resize(images, size=augment.size, **options)
    resized, fill = fn.resize(images, size=windows["resized"], **options), getattr(augment.crop, "fill", MEAN_COLOUR)
    levels, start = [float(level) for level in fill], -windows["offset"]
    return fn.slice(
        resized, start=start, shape=augment.size, axis_names="HW", out_of_bounds_policy="pad", fill_values=levels
    )


def decode_crops(encoded: DataNode, rectangle: tuple[DataNode, DataNode], *, decoder: GpuDecoder | None) -> DataNode:
    """Decode the rectangle, anchor and shape, of each image: uint8 (h, w, 3) on the CPU or the GPU."""
    rgb = types.DALIImageType.RGB
    if decoder is None:
        return fn.decoders.image_slice(encoded, *rectangle, axis_names="HW", device="cpu", output_type=rgb)
    # "mixed" leaves PNG and WebP to the CPU. Without fancy upsampling it repeats chroma, tens of levels off at edges.
    load, fancy = decoder.hardware_load, decoder.fancy_upsampling
    options = {"device": "mixed", "output_type": rgb, "hw_decoder_load": load, "jpeg_fancy_upsampling": fancy}
    if decoder.regions:
        return fn.decoders.image_slice(encoded, *rectangle, axis_names="HW", **options)
    return fn.slice(fn.decoders.image(encoded, **options), *rectangle, axis_names="HW")


def mirror_images(images: DataNode, mirror: DataNode, *, on_gpu: bool) -> DataNode:
    """Mirror the images whose `mirror` is 1: uint8 (H, W, 3), unchanged but for the order of their columns."""
    if not on_gpu:
        return fn.flip(images, horizontal=mirror)
    # `flip` launches a kernel for each image, all of which wait among those of the training; this one does for a batch.
    unchanged = {"mean": [0.0], "std": [1.0], "dtype": types.DALIDataType.UINT8}
    return fn.crop_mirror_normalize(images, mirror=mirror, output_layout="HWC", **unchanged)


def _normalize(images: DataNode, mirror: DataNode | None, *, decode: DecodeSettings) -> DataNode:
    mean, std = [value * 255 for value in decode.mean], [value * 255 for value in decode.std]
    return fn.crop_mirror_normalize(
        images, mirror=mirror, mean=mean, std=std, dtype=types.DALIDataType.FLOAT, output_layout="HWC"
    )


def as_torch(output: TensorListCPU | TensorListGPU) -> Tensor:
    """View a batch of `run()` as a tensor, without a copy and without a wait.

    `run()` has waited for this batch on the host. Any stream but -1 would make torch wait for the batches that DALI is
    still decoding, too.
    """
    tensor: Any = output.as_tensor()  # DALI's types lack the method
    return torch.utils.dlpack.from_dlpack(tensor.__dlpack__(stream=-1 if isinstance(tensor, TensorGPU) else None))


def can_decode(encoded: NDArray[np.uint8], *, reach: tuple[int, int]) -> bool:
    """Whether the CPU decodes an image completely, to at least `reach` rows and columns.

    One at a time: with others, a decoder that meets a damaged header can end the process.
    """
    with Pipeline(batch_size=1, num_threads=1, device_id=None) as pipeline:
        source = fn.external_source(source=lambda: [encoded], batch=True)
        pipeline.set_outputs(fn.decoders.image(source, device="cpu", output_type=types.DALIImageType.RGB))
    try:
        (decoded,) = pipeline.run()
    except RuntimeError:
        return False
    height, width, _ = np.asarray(decoded.at(0)).shape
    return bool(height >= reach[0] and width >= reach[1])
