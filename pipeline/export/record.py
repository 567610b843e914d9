"""`export.json`: what was exported, from which weights, and how far each file is from the network."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data.augment.crops import EvaluationCrop
from data.shards.dataset import write_atomically
from pipeline.runs.calibration import digest
from pipeline.runs.trained import TrainedModel

RECORD = "export.json"
DECIDING = ("weights_sha256", "temperature", "threshold", "preprocessing", "classes")  # for what a file answers


@dataclass(frozen=True)
class ExportedFile:
    """A file of an export; the difference is the largest one of a probability, the accuracy that on `val_images`."""

    format: str
    precision: str
    bytes: int
    sha256: str
    largest_difference: float
    top1: float | None = None
    val_images: int | None = None


def describe_model(model: TrainedModel) -> dict[str, object]:
    """Return everything that another program needs beside the parameters."""
    return {
        "run": model.run.run.name,
        "network": model.run.network,
        "architecture": model.run.values("model"),
        "classes": list(model.classes),
        "preprocessing": describe_preprocessing(model),
        "temperature": model.calibration.temperature,
        "threshold": model.calibration.threshold,
        "weights": model.run.weights_file.name,
        "weights_sha256": model.weights_sha256,
    }


def describe_preprocessing(model: TrainedModel) -> dict[str, object]:
    """Return height and width, mean and standard deviation; how images get that size only for `EvaluationCrop`.

    There an image is resized to at least, at most or exactly `frame`, depending on `fit`, and its centre is shown.
    """
    crop, values = model.crop, dict[str, object](size=list(model.size))
    if type(crop) is EvaluationCrop:
        values |= {"frame": list(crop.frame), "fit": str(crop.fit), "fill": list(crop.fill)}
        values["filter"] = "triangle, antialiased; beyond an edge its pixels repeat"
    else:
        values["crop"] = model.run.values("augment.evaluation")
    return {**values, "mean": list(model.facts.mean), "std": list(model.facts.std), "pixels": "RGB"}


def onnx_facts(model: TrainedModel) -> dict[str, str]:
    """Return the metadata of an ONNX file: everything between an image file and a class name, each value in JSON."""
    names = ("size", "frame", "fit", "fill", "run", "network", "temperature", "threshold", "weights_sha256", "classes")
    facts = {**describe_preprocessing(model), **describe_model(model)}
    return {name: json.dumps(facts[name], ensure_ascii=False) for name in names if facts.get(name) is not None}


def earlier_files(folder: Path, described: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """Return the files of an earlier export: the intact ones of the same model, and the names of the others."""
    try:
        record = json.loads((folder / RECORD).read_text())
        files = dict(record["files"])
        is_same = all(record.get(name) == described[name] for name in DECIDING)
        digests = {name: str(values["sha256"]) for name, values in files.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}, []
    present = {name: values for name, values in files.items() if (folder / name).is_file()}
    kept = {name: one for name, one in present.items() if is_same and digests[name] == digest(folder / name)}
    return kept, [name for name in present if name not in kept]


def write_record(folder: Path, values: Mapping[str, object]) -> None:
    """Write the record, the last file of an export."""
    write_atomically(folder / RECORD, json.dumps(values, indent=1, ensure_ascii=False).encode() + b"\n")
