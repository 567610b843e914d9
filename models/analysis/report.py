"""All that is said of a network, in one place: for a terminal, a page, a table, a dashboard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from models.analysis.cost import PRECISIONS, Memory
from models.analysis.effective_field import EffectiveField
from models.analysis.gradient_extent import Comparison
from models.analysis.stages import Moment, field_of, lifecycle
from models.analysis.summary import Inspection

FACTS = ("params_millions", "gmacs", "receptive_field_px", "effective_receptive_field_px")
# Of the table of layers, and what they hold where they hold something; pixels are those of the image.
COLUMNS: dict[str, type] = {
    "index": int,
    "layer": str,
    "kind": str,
    "stage": str,
    "shape": str,
    "parameters": int,
    "multiply_adds": int,
    "activation_bytes": int,
    "receptive_field_rows": int,
    "receptive_field_columns": int,
    "jump_rows": float,
    "jump_columns": float,
    "offset_rows": int,
    "offset_columns": int,
    "all_rows": bool,
    "all_columns": bool,
    "whole_image": bool,
    "misaligned_px": float,
    "separable_cost": float,
}
EFFECTIVE_SHARE = 0.9  # of the gradient's energy, by whose square the effective field is told in one number


class Stage(NamedTuple):
    """The layers of a stage together."""

    name: str
    shape: tuple[int, ...]
    layers: int
    parameters: int
    macs: int
    activations: int  # numbers in the outputs of its layers
    field: str
    jump_rows: float | None  # in pixels, None where no path of windows leads
    jump_columns: float | None


@dataclass(frozen=True)
class Report:
    """A network by name, and what was found of it.

    `memory` is that of training on `batch_size` images in a precision. `effective` and `comparisons`, of the fields by
    propagation with those by gradient, are None where nobody asked. `measured` says with which weights, over which
    images, the effective field was.
    """

    name: str
    inspection: Inspection
    memory: Memory
    batch_size: int
    precision: str
    effective: EffectiveField | None = None
    measured: str = ""
    comparisons: Sequence[Comparison] | None = None
    warnings: Sequence[str] = ()

    @property
    def moments(self) -> list[Moment]:
        """Its lifecycle."""
        return lifecycle(self.inspection)

    @property
    def facts(self) -> dict[str, float]:
        """The numbers that stand for it: of parameters, multiply-adds, the sides of its fields."""
        facts = {"params_millions": self.inspection.parameters / 1e6, "gmacs": self.inspection.macs / 1e9}
        last = self.inspection.last_window
        if last is not None and last.window is not None:
            facts["receptive_field_px"] = float(max(last.window.size))
        if self.effective is not None:
            facts["effective_receptive_field_px"] = float(self.effective.sides[EFFECTIVE_SHARE])
        return facts

    @property
    def stages(self) -> list[Stage]:
        """Its stages in the order of their work."""
        return [
            Stage(
                name=name,
                shape=layers[-1].shape,
                layers=len(layers),
                parameters=sum(layer.parameters for layer in layers),
                macs=sum(layer.macs for layer in layers),
                activations=sum(layer.activations for layer in layers),
                field=field_of(layers[-1]),
                jump_rows=layers[-1].rows.jump,
                jump_columns=layers[-1].columns.jump,
            )
            for name, layers in self.inspection.stages.items()
        ]

    @property
    def bytes_per_number(self) -> int:
        """Of the outputs of layers, where the precision lets them."""
        return PRECISIONS[self.precision].computed.itemsize

    def numbers(self) -> dict[str, object]:
        """All but the layers, for machines: bytes, pixels, shares; what was not asked for is None."""
        whole, last = self.inspection.first_whole, self.inspection.last_window
        return {
            "name": self.name,
            "image": self.inspection.image,
            **{fact: self.facts.get(fact) for fact in FACTS},
            "receptive_field_at": last and last.place,
            "whole_image_from": whole and whole.place,
            "memory_bytes": {**self.memory._asdict(), "batch_size": self.batch_size, "precision": self.precision},
            "effective_sides_px": self.effective and {str(share): side for share, side in self.effective.sides.items()},
            "effective_measured_with": self.measured or None,
            "stages": [stage._asdict() for stage in self.stages],
            "check": self.comparisons and [{**one._asdict(), "agrees": one.agrees} for one in self.comparisons],
            "warnings": list(self.warnings),
            "unknown": self.inspection.unknown,
        }

    def table(self) -> dict[str, list[object]]:
        """A row a layer, by column; what does not apply is None."""
        rows = [self._row(place) for place in range(len(self.inspection.layers))]
        return {column: [row[column] for row in rows] for column in COLUMNS}

    def _row(self, place: int) -> dict[str, object]:
        layer = self.inspection.layers[place]
        rows, columns = layer.rows, layer.columns
        return {
            "index": place,
            "layer": layer.name,
            "kind": layer.kind,
            "stage": layer.stage,
            "shape": "x".join(map(str, layer.shape)),
            "parameters": layer.parameters,
            "multiply_adds": layer.macs,
            "activation_bytes": layer.activations * self.bytes_per_number,
            "receptive_field_rows": rows.size,
            "receptive_field_columns": columns.size,
            "jump_rows": rows.jump,
            "jump_columns": columns.jump,
            "offset_rows": rows.offset,
            "offset_columns": columns.offset,
            "all_rows": rows.whole,
            "all_columns": columns.whole,
            "whole_image": layer.whole,
            "misaligned_px": layer.spread,
            "separable_cost": layer.separable,
        }
