"""From pixels to class scores: the shape, meaning and receptive field at the end of each stage.

The notes (section 8) draw this table for a sketched network. Here it holds the numbers of the given network, with the
numbers of the sketch beside those that differ.
"""

from __future__ import annotations

from typing import NamedTuple

from models.analysis.receptive_field import ReceptiveField
from models.analysis.summary import LayerSummary, NetworkSummary

# A rule of thumb: which features stages tend to respond to, from the first map to the last.
MEANINGS = (
    "edges, colour gradients",
    "textures, corners, simple patterns",
    "parts of objects, repeated motifs",
    "complete objects",
)
IMAGE_SUMMARY = "summary of the image"
SKETCHED_IMAGE = (3, 224, 224)


class Sketch(NamedTuple):
    """A stage in the usual sketch of a CNN at 224 pixels: shape, side of the receptive field, and their origin."""

    stage: str
    shape: tuple[int, int, int]
    field: int
    reason: str


SKETCHES = (
    Sketch("stem", (64, 112, 112), 7, "ResNet's first convolution, without the pooling after it"),
    Sketch("stage2", (128, 56, 56), 35, "map and field of ResNet-50's first stage, width of ResNet-18's second"),
    Sketch("stage3", (256, 28, 28), 91, "map and field of ResNet-50's second stage, width of ResNet-18's third"),
    Sketch(
        "stage4",
        (512, 7, 7),
        224,
        "the image's side; the fields of ResNet-18 (435 px) and ResNet-50 (427 px) exceed it",
    ),
)


class StageSummary(NamedTuple):
    """The end of a stage: output shape for one image, meaning, receptive field of one unit.

    `sketch` holds the numbers of the usual sketch where they differ, None elsewhere.
    """

    name: str
    shape: tuple[int, ...]
    meaning: str
    rows: ReceptiveField
    columns: ReceptiveField
    sketch: Sketch | None = None


def lifecycle(summary: NetworkSummary) -> list[StageSummary]:
    """The input, the end of every stage, the pooled features and the logits of a network."""
    pixel = ReceptiveField(1, 1.0, 0)
    ends = {name: layers[-1] for name, layers in summary.stages.items() if len(layers[-1].shape) == 3}
    maps = [name for name, layer in ends.items() if not _is_pooled(layer)]
    stages = [StageSummary("input", summary.image_shape, "raw pixel intensities", pixel, pixel)]
    for name, layer in ends.items():
        meaning = IMAGE_SUMMARY
        if name in maps:
            meaning = MEANINGS[maps.index(name) * (len(MEANINGS) - 1) // max(1, len(maps) - 1)]
        sketch = _differing_sketch(layer) if summary.image_shape == SKETCHED_IMAGE else None
        stages.append(StageSummary(name, layer.shape, meaning, layer.rows, layer.columns, sketch))
    return [*stages, *_head(summary.layers)]


def _is_pooled(layer: LayerSummary) -> bool:
    return layer.is_global and not layer.has_local_field and layer.shape[1:] == (1, 1)


def _head(layers: list[LayerSummary]) -> list[StageSummary]:
    last = layers[-1]
    flat = [layer for layer in layers if len(layer.shape) < 3 or layer.shape[1:] == (1, 1)]
    pooled = next((layer for layer in flat if layer.stage == last.stage), last)
    stages = []
    if pooled is not last:
        stages.append(StageSummary("pooled", pooled.shape[:1], IMAGE_SUMMARY, pooled.rows, pooled.columns))
    return [*stages, StageSummary("logits", last.shape, "class scores, not normalised", last.rows, last.columns)]


def _differing_sketch(layer: LayerSummary) -> Sketch | None:
    sketch = next((sketch for sketch in SKETCHES if sketch.stage == layer.stage), None)
    if sketch is None or not layer.has_local_field:
        return None
    return None if (layer.shape, layer.rows.size) == (sketch.shape, sketch.field) else sketch
