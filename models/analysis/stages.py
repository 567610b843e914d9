"""From pixels to class scores: what becomes of an image on its way through a network, stage by stage.

Section 8 of the notes tells this of a sketched network. Here it is told of the network at hand, and where the sketch
says otherwise of a stage of that name, a footnote says what the sketch is made of.
"""

from __future__ import annotations

from typing import NamedTuple

from models.analysis.summary import Inspection, Layer

MEANINGS = (
    "edges, colour gradients",
    "textures, corners, simple patterns",
    "parts of objects, repeated motifs",
    "objects as wholes",
)
SUMMARY = "summary of the image"


class Moment(NamedTuple):
    """A stage's end: the shape for one image, what it stands for, what one unit of it sees, and a footnote."""

    stage: str
    shape: tuple[int, ...]
    meaning: str
    field: str
    footnote: str | None


class Sketched(NamedTuple):
    """What the notes' table has for a stage at 224 pixels, and where that comes from."""

    shape: tuple[int, int, int]
    field: int
    why: str


SKETCH = {
    "stem": Sketched((64, 112, 112), 7, "that is ResNet's first convolution, without the pooling behind it"),
    "stage2": Sketched(
        (128, 56, 56),
        35,
        "that map and field are those of ResNet-50's first stage, the width that of ResNet-18's second",
    ),
    "stage3": Sketched(
        (256, 28, 28),
        91,
        "that map and field are those of ResNet-50's second stage, the width that of ResNet-18's third",
    ),
    "stage4": Sketched(
        (512, 7, 7),
        224,
        "224 is the side of the image: ResNet-18 sees 435 pixels here, ResNet-50 427, beyond its borders",
    ),
}


def lifecycle(inspection: Inspection) -> list[Moment]:
    """The input, the end of every stage, the pooled features and the logits of a network."""
    moments = [Moment("input", inspection.image, "raw intensities of pixels", "1x1 px", None)]
    stages = inspection.stages
    ends = {name: layers[-1] for name, layers in stages.items() if len(layers[-1].shape) == 3}
    maps = [name for name, layer in ends.items() if not _is_summary(layer)]
    for name, layer in ends.items():
        meaning = SUMMARY
        if name in maps:
            meaning = MEANINGS[maps.index(name) * (len(MEANINGS) - 1) // max(1, len(maps) - 1)]
        moments.append(Moment(name, layer.shape, meaning, field_of(layer), _footnote(layer, inspection.image)))
    return [*moments, *_end(inspection)]


def field_of(layer: Layer) -> str:
    """What one unit sees, in words: its window, and what it sees of the image at once by another path.

    Along an axis without windows the second is all there is: `5 px x all`.
    """
    rows, columns = layer.rows, layer.columns
    if layer.window is not None:
        whole = {(True, True): " + whole image", (True, False): " + all rows", (False, True): " + all columns"}
        return f"{rows.size:,}x{columns.size:,} px" + whole.get((rows.whole, columns.whole), "")
    if layer.whole:
        return "whole image"
    if not rows.whole and not columns.whole:
        return "unknown"
    return " x ".join("all" if seen.size is None else f"{seen.size:,} px" for seen in (rows, columns))


def both_ways(rows: float | None, columns: float | None) -> str:
    """A number along rows and along columns in words: one where both are equal, `-` for none, '' for two of none."""
    if rows is None and columns is None:
        return ""
    along_rows, along_columns = ("-" if number is None else f"{number:,g}" for number in (rows, columns))
    return along_rows if rows == columns else f"{along_rows}x{along_columns}"


def _is_summary(layer: Layer) -> bool:
    return layer.whole and layer.window is None and layer.shape[1:] == (1, 1)


def _end(inspection: Inspection) -> list[Moment]:
    flat = [layer for layer in inspection.layers if len(layer.shape) < 3 or layer.shape[1:] == (1, 1)]
    last = inspection.layers[-1]
    head = [layer for layer in flat if layer.stage == last.stage]
    moments = []
    if head and head[0] is not last:
        pooled = head[0]
        moments.append(Moment("pooled", pooled.shape[:1], SUMMARY, field_of(pooled), None))
    return [*moments, Moment("logits", last.shape, "scores of the classes, not normalised", field_of(last), None)]


def _footnote(layer: Layer, image: tuple[int, int, int]) -> str | None:
    sketched = SKETCH.get(layer.stage)
    if sketched is None or image != (3, 224, 224) or layer.window is None:
        return None
    if (layer.shape, layer.window.size.rows) == (sketched.shape, sketched.field):
        return None
    shape = "x".join(map(str, sketched.shape))
    return (
        f"The usual sketch of a CNN has {shape} and {sketched.field}x{sketched.field} px after {layer.stage}: "
        f"{sketched.why}."
    )
