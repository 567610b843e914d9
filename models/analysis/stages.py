"""From pixels to class scores: the shape, meaning and receptive field at the end of each stage (notes, section 8)."""

from typing import NamedTuple

from models.analysis.receptive_field import ReceptiveField
from models.analysis.summary import LayerSummary, NetworkSummary

MEANINGS = (  # a rule of thumb: which features stages tend to respond to, from the first map to the last
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
    """The end of a stage: output shape for one image, meaning, receptive field of one unit."""

    name: str
    shape: tuple[int, ...]
    meaning: str
    rows: ReceptiveField
    columns: ReceptiveField
    sketch: Sketch | None = None  # the usual sketch, where it differs


def lifecycle(summary: NetworkSummary) -> list[StageSummary]:
    """The input, the end of every stage, the pooled features and the logits of a network."""
    pixel = ReceptiveField(1, 1.0, 0)
    ends = {name: layers[-1] for name, layers in summary.stages.items() if len(layers[-1].shape) == 3}
    maps = [name for name, one in ends.items() if one.local_size or not one.is_global or one.shape[1:] != (1, 1)]
    stages = [StageSummary("input", summary.image_shape, "raw pixel intensities", pixel, pixel)]
    for name, layer in ends.items():
        meaning = IMAGE_SUMMARY
        if name in maps:
            meaning = MEANINGS[maps.index(name) * (len(MEANINGS) - 1) // max(1, len(maps) - 1)]
        sketch = _differing_sketch(layer) if summary.image_shape == SKETCHED_IMAGE else None
        stages.append(StageSummary(name, layer.shape, meaning, layer.rows, layer.columns, sketch))
    return [*stages, *_head(summary.layers)]


def _head(layers: list[LayerSummary]) -> list[StageSummary]:
    last = layers[-1]
    flat = [layer for layer in layers if len(layer.shape) < 3 or layer.shape[1:] == (1, 1)]
    first = next((layer for layer in flat if layer.stage == last.stage), last)
    pooled = StageSummary("pooled", first.shape[:1], IMAGE_SUMMARY, first.rows, first.columns)
    logits = StageSummary("logits", last.shape, "class scores, not normalised", last.rows, last.columns)
    return [logits] if first is last else [pooled, logits]


def _differing_sketch(layer: LayerSummary) -> Sketch | None:
    found = (layer.shape, layer.rows.size)
    sketches = (one for one in SKETCHES if one.stage == layer.stage and (one.shape, one.field) != found)
    return next(sketches, None) if layer.local_size else None
