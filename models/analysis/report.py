"""All results of the analysis of a network in one place, for terminals, pages, tables and dashboards."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.analysis.cost import PRECISIONS, TrainingMemory
from models.analysis.effective_field import EffectiveField
from models.analysis.gradient_extent import FieldComparison
from models.analysis.receptive_field import ReceptiveField
from models.analysis.stages import StageSummary, lifecycle
from models.analysis.summary import LayerSummary, NetworkSummary

FACTS = ("params_millions", "gmacs", "receptive_field_px", "effective_receptive_field_px")
EFFECTIVE_SHARE = 0.9  # of the gradient's energy: its square is the one number that stands for the effective field


class StageTotals(NamedTuple):
    """The layers of a stage together; shape and receptive field are those of its last layer."""

    name: str
    shape: tuple[int, ...]
    num_layers: int
    num_parameters: int
    macs: int
    num_activations: int
    rows: ReceptiveField
    columns: ReceptiveField

    def to_dict(self) -> dict[str, object]:
        """The stage for a JSON file."""
        names = ("name", "shape", "layers", "parameters", "macs", "activations")
        fields = {"rows": self.rows._asdict(), "columns": self.columns._asdict()}
        strides = {"jump_rows": self.rows.stride, "jump_columns": self.columns.stride}
        return {**dict(zip(names, self, strict=False)), **fields, **strides}


@dataclass(frozen=True)
class Report:
    """The analysis of one network."""

    name: str
    summary: NetworkSummary
    memory: TrainingMemory  # of training on `batch_size` images in this precision
    batch_size: int
    precision: str
    effective: EffectiveField | None = None  # None if not requested
    measured_with: str = ""  # the weights and images of the effective field
    sample_image: NDArray[np.uint8] | None = None  # one of these images, (H, W, 3)
    comparisons: Sequence[FieldComparison] | None = None  # None if not requested
    warnings: Sequence[str] = ()

    @property
    def lifecycle(self) -> list[StageSummary]:
        """The way of an image through the network, stage by stage."""
        return lifecycle(self.summary)

    @property
    def facts(self) -> dict[str, float]:
        """The main numbers, by the names in `FACTS`; those that do not exist are left out."""
        facts = {"params_millions": self.summary.num_parameters / 1e6, "gmacs": self.summary.macs / 1e9}
        last = self.summary.last_local_layer
        if last is not None and last.local_size is not None:
            facts["receptive_field_px"] = float(max(last.local_size))
        if self.effective is not None:
            facts["effective_receptive_field_px"] = float(self.effective.sides[EFFECTIVE_SHARE])
        return facts

    @property
    def stages(self) -> list[StageTotals]:
        """The stages in the order of execution."""
        stages = []
        for name, layers in self.summary.stages.items():
            num_parameters, macs = sum(one.num_parameters for one in layers), sum(one.macs for one in layers)
            counts = (len(layers), num_parameters, macs, sum(one.num_activations for one in layers))
            last = layers[-1]
            stages.append(StageTotals(name, last.shape, *counts, last.rows, last.columns))
        return stages

    @property
    def bytes_per_activation(self) -> int:
        """Bytes of one number in the output of a layer, in the compute type of the precision."""
        return PRECISIONS[self.precision].computed.itemsize

    def to_dict(self) -> dict[str, object]:
        """Everything except the layers, for a JSON file; results that were not requested are None."""
        first, last = self.summary.first_global_layer, self.summary.last_local_layer
        effective, comparisons = self.effective, self.comparisons
        return {
            "name": self.name,
            "image": self.summary.image_shape,
            **{fact: self.facts.get(fact) for fact in FACTS},
            "receptive_field_at": last and last.location,
            "whole_image_from": first and first.location,
            "memory_bytes": {**self.memory._asdict(), "batch_size": self.batch_size, "precision": self.precision},
            "effective_sides_px": effective and {str(share): side for share, side in effective.sides.items()},
            "effective_measured_with": self.measured_with or None,
            "stages": [stage.to_dict() for stage in self.stages],
            "check": comparisons and [comparison.to_dict() for comparison in comparisons],
            "warnings": list(self.warnings),
            "unknown": self.summary.unknown,
        }

    def layer_table(self) -> dict[str, list[object]]:
        """The layers as columns of equal length, by the names in `LAYER_COLUMNS`; missing values are None."""
        columns = _layer_columns(self.summary.layers, self.bytes_per_activation)
        return {name: values for name, (_, values) in columns.items()}


def _layer_columns(layers: Sequence[LayerSummary], bytes_per_activation: int) -> dict[str, tuple[type, list[object]]]:
    """Type and values of every column of the layer table; pixels are those of the image."""
    return {
        "index": (int, list(range(len(layers)))),
        "layer": (str, [layer.name for layer in layers]),
        "kind": (str, [layer.kind for layer in layers]),
        "stage": (str, [layer.stage for layer in layers]),
        "shape": (list, [list(layer.shape) for layer in layers]),
        "parameters": (int, [layer.num_parameters for layer in layers]),
        "multiply_adds": (int, [layer.macs for layer in layers]),
        "activation_bytes": (int, [layer.num_activations * bytes_per_activation for layer in layers]),
        "receptive_field_rows": (int, [layer.rows.size for layer in layers]),
        "receptive_field_columns": (int, [layer.columns.size for layer in layers]),
        "jump_rows": (float, [layer.rows.stride for layer in layers]),
        "jump_columns": (float, [layer.columns.stride for layer in layers]),
        "offset_rows": (int, [layer.rows.offset for layer in layers]),
        "offset_columns": (int, [layer.columns.offset for layer in layers]),
        "all_rows": (bool, [layer.rows.is_global for layer in layers]),
        "all_columns": (bool, [layer.columns.is_global for layer in layers]),
        "whole_image": (bool, [layer.is_global for layer in layers]),
        "misaligned_px": (float, [layer.misalignment for layer in layers]),
        "separable_cost": (float, [layer.separable_cost for layer in layers]),
    }


LAYER_COLUMNS = {name: kind for name, (kind, _) in _layer_columns([], 0).items()}
