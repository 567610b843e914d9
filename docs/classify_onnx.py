"""Classify images without Convoy and torch: `python classify_onnx.py model.onnx a.jpg b.jpg`."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def resize_weights(size: int, resized: int, shown: int) -> np.ndarray:
    """Return the triangle filter (shown, size) that resizes `size` pixels to `resized` and shows the central ones."""
    scale, reach = size / resized, size // resized + 1
    centers = (round((resized - shown) / 2) + np.arange(shown)[:, None] + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(-reach, size + reach) + 0.5 - centers) / max(scale, 1))
    weights *= ((centers > 0) & (centers < size)) / weights.sum(1, keepdims=True).clip(1e-9)
    places = np.arange(-reach, size + reach).clip(0, size - 1)  # beyond an edge its pixels repeat
    return np.add.reduceat(weights, np.searchsorted(places, np.arange(size)), 1).astype(np.float32)


model = onnxruntime.InferenceSession(sys.argv[1])
facts = {name: json.loads(text) for name, text in model.get_modelmeta().custom_metadata_map.items()}
for path in sys.argv[2:]:
    pixels = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB")) - np.float32(facts["fill"])
    scale = {"crop": max, "pad": min, "squash": list}[facts["fit"]](np.divide(facts["frame"], pixels.shape[:2]))
    resized = np.int64(np.multiply(pixels.shape[:2], scale) + 1e-9).clip(1)
    rows, columns = map(resize_weights, pixels.shape, resized, facts["size"])
    image = np.rint(columns @ np.tensordot(rows, pixels, 1) + facts["fill"]).astype(np.uint8)
    probabilities = model.run(None, {"images": image[None]})[0][0]
    print(path, facts["classes"][probabilities.argmax()], *(f"{value:.6f}" for value in probabilities))
