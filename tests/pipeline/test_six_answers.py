"""Six ways to ask a run about the same photographs give the same answers."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from data.loading.inputs import file_source
from pipeline import load, pack
from pipeline.evaluate import __main__ as evaluate
from pipeline.export import __main__ as export
from pipeline.predict import __main__ as predict
from pipeline.runs.trained import TrainedModel
from pipeline.train import __main__ as train
from tests.support.commands import call_verb
from tests.support.images import make_jpeg, orientation
from tests.support.paths import ROOT
from tests.support.serving import served_answers

COUNT, TOLERANCE = 100, 1e-4
MODES = {1: "L", 2: "CMYK"}  # of an image by the last digit of its number
TRAIN = (
    *("+model=resnet", "data=shards", "data.root=datasets/photos", "data.image_size=[24,40]", "data.batch_size=8"),
    *("recipe.epochs=10", "recipe.warmup_epochs=1", "recipe.optimizer.lr=0.02", "+trainer.limit_val_batches=1"),
    *("name=photos", "trainer=cpu", "augment=gentle", "fit=pad"),
)


def photograph(number: int) -> bytes:
    """One of many sizes, brighter from class to class; every tenth is grey, CMYK, or turned by EXIF."""
    size = (40 + 13 * number % 171, 50 + 29 * number % 203)
    image = Image.open(io.BytesIO(make_jpeg(*size, seed=number)))
    image = image.point(lambda level: level // 3 + 60 * (number % 3)).convert(MODES.get(number % 10, "RGB"))
    options = {"exif": orientation(1 + number % 8)} if number % 10 == 3 else {}
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photographs, packed, and a run that was trained on some, evaluated and exported."""
    root = tmp_path_factory.mktemp("answers")
    for number in range(COUNT + 24):
        folder = root / "photos" / ("val" if number < COUNT else "train") / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:03d}.jpg").write_bytes(photograph(number))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for verb, *words in (
            (pack, "source=folder", "source.root=photos", "name=photos"),
            (train, *TRAIN),
            (evaluate, "run=photos", "precision=0.5"),
            (predict, "run=photos", "input=photos/val", "out=answers.jsonl", "top=3"),
            (export, "run=photos", "register=photos"),
        ):
            call_verb(verb.VERB, verb.main, words)
    return root


@pytest.mark.engines
def test_all_ways_agree(root: Path) -> None:
    model, export = load(root / "runs" / "photos", device="cpu"), root / "runs" / "photos" / "export"
    paths = sorted((root / "photos" / "val").rglob("*.jpg"))
    loaded = torch.stack([one.probabilities for one in model.predict(paths)]).numpy()
    assert loaded.shape == (COUNT, 3)
    crops = crops_of(model, paths)
    program = torch.export.load(export / "model.pt2").module()
    served = served_answers(f"sqlite:///{root / 'mlflow.db'}", "photos", crops.numpy())
    answers = {
        "evaluate": evaluated(root, model, paths),
        "predict": predicted(root, model),
        "the example with onnxruntime": classified(root, export / "model.onnx", paths),
        "torch.export": program(crops).detach().numpy(),
        "a server": np.array(served["predictions"]["probabilities"]),
    }
    assert np.ptp(loaded, axis=0).max() > 100 * TOLERANCE, "the predictions differ between images"
    for name, found in answers.items():
        assert np.abs(found - loaded).max() <= TOLERANCE, name
        assert (found.argmax(1) == loaded.argmax(1)).all(), name


def crops_of(model: TrainedModel, paths: list[Path]) -> torch.Tensor:
    """The photographs as the network takes them: uint8 (N, H, W, 3)."""
    return torch.cat([model.crops(batch) for batch in model.decode(map(file_source, paths))])


def evaluated(root: Path, model: TrainedModel, paths: list[Path]) -> np.ndarray:
    table = pq.read_table(root / "runs" / "photos" / "evaluation" / "val" / "predictions.parquet").to_pylist()
    rows = {row["key"].split("/")[-1]: row for row in table}
    return in_order([(rows[path.stem]["top_classes"], rows[path.stem]["top_probabilities"]) for path in paths], model)


def predicted(root: Path, model: TrainedModel) -> np.ndarray:
    rows = [json.loads(line) for line in (root / "answers.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: row["path"])
    return in_order([(row["top_classes"], row["top_probabilities"]) for row in rows], model)


def classified(root: Path, file: Path, paths: list[Path]) -> np.ndarray:
    command = [sys.executable, str(ROOT / "docs" / "classify_onnx.py"), str(file), *map(str, paths)]
    answer = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return np.array([line.split()[2:] for line in answer.stdout.splitlines()], float)


def in_order(rows: list[tuple[list[str], list[float]]], model: TrainedModel) -> np.ndarray:
    """Probabilities in the order of the model's classes."""
    return np.array([[dict(zip(*row, strict=True))[name] for name in model.classes] for row in rows])
