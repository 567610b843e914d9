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
    """Return crop, mean and standard deviation; `resize_shorter_side` only for the central crop."""
    values: dict[str, object] = {"image_size": model.image_size}
    if type(model.crop) is EvaluationCrop:
        values |= {"resize_shorter_side": round(model.image_size / model.crop.crop_fraction), "crop": "center"}
        values["filter"] = "triangle, antialiased; beyond an edge its pixels repeat"
    else:
        values["crop"] = model.run.values("augment.evaluation")
    return {**values, "mean": list(model.facts.mean), "std": list(model.facts.std), "pixels": "RGB"}


def onnx_facts(model: TrainedModel) -> dict[str, str]:
    """Return the metadata of an ONNX file: everything between an image file and a class name."""
    described = describe_model(model)
    preprocessing = describe_preprocessing(model)
    names = ("image_size", "resize_shorter_side")
    facts = {name: str(preprocessing[name]) for name in names if name in preprocessing}
    facts |= {name: str(described[name]) for name in ("run", "network", "temperature", "weights_sha256")}
    if model.calibration.threshold is not None:
        facts["threshold"] = str(model.calibration.threshold)
    return facts | {"classes": json.dumps(model.classes, ensure_ascii=False)}


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
