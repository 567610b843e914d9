"""The files of an evaluation: a page, JSON for programs, a Parquet table with a row for each image."""

import base64
import io
import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.metrics import confusion_matrix

from data.augment.crops import CropPolicy, describe_size
from data.shards.dataset import Dataset, Index, write_atomically
from data.shards.images import UnreadableImage, shrink
from data.storage.local import Storage, read_bytes
from pipeline.evaluate.assess import Evaluation, confident_mistakes, differing
from pipeline.evaluate.metrics import TOP, worst_confusions
from pipeline.pages.charts import ConfidenceBins
from pipeline.pages.evaluation_page import Confusion, Curves, Picture, render_evaluation
from pipeline.runs.trained import TrainedModel

PICTURES, PICTURE_SIDE = 24, 112  # px
CONFUSIONS, MATRIX_CLASSES, CURVE_POINTS = 20, 20, 200
PAGE, NUMBERS, TABLE = "index.html", "evaluation.json", "predictions.parquet"


class Subject(NamedTuple):
    """The run, weights and split of an evaluation, for the page and the JSON. Digests are SHA-256."""

    run: str
    network: str
    weights: str
    weights_sha256: str
    dataset: str
    split: str
    split_digest: str
    image_size: str


def subject_of(model: TrainedModel, dataset: Dataset, *, split: str, crop: CropPolicy) -> Subject:
    """Describe an evaluation."""
    run = model.run
    return Subject(
        run=run.run.name,
        network=run.network,
        weights=run.weights_file.name,
        weights_sha256=model.weights_sha256,
        dataset=dataset.name,
        split=split,
        split_digest=dataset.splits[split].digest,
        image_size=describe_size(crop.image_size),
    )


def write_evaluation(
    evaluation: Evaluation, subject: Subject, *, folder: Path, index: Index, storage: Storage
) -> list[Path]:
    """Write all files, the JSON last, and return their paths. Raises: OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    mistakes = _pictures(confident_mistakes(evaluation, PICTURES), evaluation, index=index, storage=storage)
    differences = _pictures(differing(evaluation, PICTURES), evaluation, index=index, storage=storage)
    files = [folder / name for name in (PAGE, TABLE, NUMBERS)]
    found, confusion, curves = numbers(evaluation, subject), confusion_of(evaluation), curves_of(evaluation)
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
    page = render_evaluation(found, confusion=confusion, curves=curves, mistakes=mistakes, differences=differences)
    write_atomically(files[0], page.encode())
    _write_table(files[1], evaluation, index=index)
    write_atomically(files[2], text.encode() + b"\n")
    return files


def confusion_of(evaluation: Evaluation) -> Confusion:
    """Count answers by right class, of all classes or of those with the most mistakes."""
    labels, predicted, count = evaluation.answers.labels, evaluation.answers.predicted, len(evaluation.classes)
    wrong = labels != predicted
    mistakes = np.bincount(labels[wrong], minlength=count) + np.bincount(predicted[wrong], minlength=count)
    shown = np.sort(np.argsort(-mistakes, kind="stable")[:MATRIX_CLASSES])
    images = confusion_matrix(labels, predicted, labels=list(range(count)))[np.ix_(shown, shown)]
    return Confusion([evaluation.classes[one] for one in shown], images, count)


def curves_of(evaluation: Evaluation) -> Curves:
    """Return the points of the charts."""
    both = (evaluation.reliability, evaluation.calibrated_reliability)
    before, after = (ConfidenceBins(one.confidence, one.accuracy, one.images) for one in both)
    order = np.argsort(-evaluation.calibrated.probabilities.max(1), kind="stable")
    right = np.cumsum(evaluation.calibrated.is_among_top(1)[order])
    places = np.unique(np.linspace(1, len(order), min(len(order), CURVE_POINTS)).round().astype(int))
    return Curves(before, after, places / len(order), right[places - 1] / places)


def numbers(evaluation: Evaluation, subject: Subject) -> dict[str, Any]:
    """Return the numbers of an evaluation for JSON; None where one is undefined."""
    of_classes = evaluation.class_metrics
    columns = {name: _plain(getattr(of_classes, name)) for name in of_classes._fields}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    versus = evaluation.versus
    return {
        **subject._asdict(),
        "images": len(evaluation.answers.labels),
        "metrics": {name: _number(value) for name, value in evaluation.summary.items()},
        "intervals_95": {name: list(ends) for name, ends in evaluation.intervals.items()},
        "calibration": {
            **asdict(evaluation.calibration),
            "fitted_on": evaluation.fitted_on,
            "expected_calibration_error": evaluation.reliability.error,
            "expected_calibration_error_with_temperature": evaluation.calibrated_reliability.error,
            "loss_with_temperature": float(evaluation.calibrated.losses.mean()),
            "answered": None if evaluation.abstention is None else evaluation.abstention.coverage,
            "top1_of_answered": None if evaluation.abstention is None else _number(evaluation.abstention.accuracy),
        },
        "classes": [{"class": name, **row} for name, row in zip(evaluation.classes, rows, strict=True)],
        "confusions": [
            {"class": evaluation.classes[label], "predicted": evaluation.classes[predicted], "images": count}
            for label, predicted, count in worst_confusions(evaluation.answers, CONFUSIONS)
        ],
        "sizes": dict(evaluation.sizes),
        "versus": None
        if versus is None
        else {
            "run": versus.name,
            "top1": versus.top1,
            "right_here_alone": versus.right_here_alone,
            "right_there_alone": versus.right_there_alone,
            "mcnemar_p": versus.p_value,
        },
    }


def _write_table(path: Path, evaluation: Evaluation, *, index: Index) -> None:
    """Write a row for each image, in the order of the index."""
    shards, keys = zip(*index.names(), strict=True)
    answers, calibrated, names = evaluation.answers, evaluation.calibrated, np.array(evaluation.classes, object)
    best = np.argsort(-calibrated.log_probabilities, axis=1, kind="stable")[:, :TOP]
    columns: dict[str, Any] = {
        "shard": shards,
        "key": keys,
        "class": names[answers.labels],
        "predicted": names[answers.predicted],
        "probability": calibrated.probabilities.max(1),
        "right": answers.is_among_top(1),
        "unsure": evaluation.is_unsure,
        "loss": answers.losses,
        "top_classes": names[best].tolist(),
        "top_probabilities": np.take_along_axis(calibrated.probabilities, best, axis=1).tolist(),
    }
    if evaluation.versus is not None:
        columns |= {"versus_predicted": names[evaluation.versus.answers.predicted]}
        columns |= {"versus_right": evaluation.versus.answers.is_among_top(1)}
    content = io.BytesIO()
    pq.write_table(pa.table(columns), content)
    write_atomically(path, content.getvalue())


def _pictures(samples: list[int], evaluation: Evaluation, *, index: Index, storage: Storage) -> list[Picture]:
    """Read images of a split as small pictures, with their classes."""
    rows = index.rows(np.array(samples, np.int64))
    pictures = []
    for sample, shard, offset, size, name in zip(
        samples, rows.shard, rows.offset, rows.size, index.keys(samples), strict=True
    ):
        encoded = read_bytes(storage, index.split.shards[shard].file, offset=int(offset), size=int(size))
        label, answer = (int(one[sample]) for one in (evaluation.answers.labels, evaluation.answers.predicted))
        probability = float(evaluation.calibrated.probabilities[sample].max())
        other = evaluation.versus and evaluation.classes[int(evaluation.versus.answers.predicted[sample])]
        uri = _data_uri(encoded)
        pictures.append(
            Picture(uri, name, evaluation.classes[label], evaluation.classes[answer], probability, other or "")
        )
    return pictures


def _data_uri(encoded: bytes) -> str:
    """An image for a page, empty where Pillow cannot read it."""
    try:
        small = shrink(encoded, PICTURE_SIDE)
    except UnreadableImage:
        return ""
    kind = "png" if small.startswith(b"\x89PNG") else "webp" if small.startswith(b"RIFF") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(small).decode()}"


def _plain(values: Iterable[float]) -> list[float | int | None]:
    return [_number(one) for one in np.asarray(values).tolist()]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
