"""Classify images without Convoy and torch: `python classify_onnx.py model.onnx a.jpg b.jpg`."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def resize_weights(size: int, resized: int, crop: int) -> np.ndarray:
    """Return the triangle filter (crop, size) that resizes `size` pixels to `resized` and keeps the central `crop`."""
    scale, reach = size / resized, size // resized + 1
    centers = (round((resized - crop) / 2) + np.arange(crop)[:, None] + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(-reach, size + reach) + 0.5 - centers) / max(scale, 1))
    weights[:, reach] += weights[:, :reach].sum(1)  # beyond an edge its pixels repeat
    weights[:, -reach - 1] += weights[:, -reach:].sum(1)
    weights = weights[:, reach:-reach]
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


session = onnxruntime.InferenceSession(sys.argv[1])
facts = session.get_modelmeta().custom_metadata_map
crop, shorter, classes = int(facts["image_size"]), int(facts["resize_shorter_side"]), json.loads(facts["classes"])
for path in sys.argv[2:]:
    pixels = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"), np.float32)
    rows, columns = (resize_weights(side, shorter * side // min(pixels.shape[:2]), crop) for side in pixels.shape[:2])
    image = np.rint(np.einsum("ih,hwc,jw->ijc", rows, pixels, columns, optimize=True)).clip(0, 255).astype(np.uint8)
    (probabilities,) = session.run(None, {"images": image[None]})
    print(path, classes[probabilities[0].argmax()], *(f"{value:.6f}" for value in probabilities[0]))
