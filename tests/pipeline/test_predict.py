"""Predictions of a run: the verb, its formats, and the same model in plain Python."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from data.shards.inputs import file_source
from pipeline import load
from pipeline.runs.calibration import Calibration
from tests.support.commands import FinishedRun, run_module
from tests.support.images import make_folder
from tests.support.paths import ROOT

FURTHER = ("class_2", "probability_2", "class_3", "probability_3")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_folder(tmp_path_factory.mktemp("photos"), classes=2, images=5)
    (root / "class0" / "02.jpg").write_bytes(b"\xff\xd8 cut")
    return root


def test_all_formats_and_plain_python_agree(main_job: FinishedRun, photos: Path, tmp_path: Path) -> None:
    model = load(main_job.folder)
    expected = model.predict(sorted(photos.rglob("*.jpg")))
    assert [one.error for one in expected].count(None) == 9
    assert model.classes == tuple(map(str, range(10)))
    for suffix in ("csv", "jsonl", "parquet"):
        out = tmp_path / f"answers.{suffix}"
        words = ("run=latest", f"input={photos}", f"out={out}", "top=3", "batch_size=4")
        answer = run_module(main_job.root, "pipeline.predict", *words)
        assert answer.returncode == 2, answer.stderr
        assert "10 images in " in answer.stderr
        assert "1 unreadable" in answer.stderr
        if suffix == "csv":
            rows = [row | {"probability": float(row["probability"] or 0)} for row in csv.DictReader(out.open())]
            assert list(rows[0]) == [
                "path",
                "class",
                "probability",
                "unsure",
                "error",
                *["class_2", "probability_2", "class_3", "probability_3"],
            ]
        elif suffix == "jsonl":
            rows = [json.loads(line) for line in out.read_text().splitlines()]
            assert [name for name, _ in expected[0].top(3)] == rows[0]["top_classes"]
        else:
            rows = pq.read_table(out).to_pylist()
        assert [row["path"] for row in rows] == [one.name for one in expected]
        for row, one in zip(rows, expected, strict=True):
            assert (row["class"] or None, row["error"] or None) == (one.label, one.error)
            assert row["probability"] == (one.probability and pytest.approx(one.probability, abs=2e-6)) or one.error


def test_a_list_on_standard_input_is_answered_on_standard_output(main_job: FinishedRun, photos: Path) -> None:
    words = ["run=latest", "input=photos/class1", "top=1"]
    (main_job.root / "photos").symlink_to(photos)
    answer = run_module(main_job.root, "pipeline.predict", *words)
    assert answer.returncode == 0, answer.stderr
    rows = list(csv.reader(io.StringIO(answer.stdout)))
    assert rows[0] == ["path", "class", "probability", "unsure", "error"]
    assert len(rows) == 6
    assert "unreadable" not in answer.stderr


def test_an_evaluations_temperature_and_threshold_are_used(main_job: FinishedRun, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "fitted"
    shutil.copytree(main_job.folder, folder, ignore=shutil.ignore_patterns("evaluation"))
    plain, paths = load(folder), sorted((photos / "class1").iterdir())
    Calibration(2.0, 0.9999, 0.99).save(folder / "evaluation" / "calibration.json", weights_sha256=plain.weights_sha256)
    fitted = load(folder)
    for before, after in zip(plain.predict(paths), fitted.predict(paths), strict=True):
        flat = torch.softmax(before.probabilities.log() / 2, dim=0)
        torch.testing.assert_close(after.probabilities, flat, rtol=1e-5, atol=1e-6)
        assert (before.is_unsure, after.is_unsure) == (False, True)
    answer = run_module(tmp_path, "pipeline.predict", "run=fitted", f"input={photos}/class1")
    rows = list(csv.DictReader(io.StringIO(answer.stdout)))
    assert [row["unsure"] for row in rows] == ["unsure"] * 5


def test_a_reader_that_has_enough_sees_no_error(main_job: FinishedRun, photos: Path) -> None:
    command = f"{sys.executable} -m pipeline.predict run=latest input={photos}/class1 batch_size=1 | head -1"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    answer = subprocess.run(
        command, shell=True, cwd=main_job.root, env=environment, capture_output=True, text=True, check=True
    )
    assert answer.stdout.startswith("path,class,probability,unsure,error")
    assert "Errno" not in answer.stderr


def test_crops_are_the_same_as_files(main_job: FinishedRun, photos: Path) -> None:
    model = load(main_job.folder)
    files = sorted((photos / "class1").glob("*.jpg"))
    of_files = torch.stack([one.probabilities for one in model.predict(files)])
    assert of_files.shape == (5, 10)
    assert torch.allclose(of_files.sum(1), torch.ones(5))
    normalised = next(iter(model.decode(map(file_source, files)))).images
    colours = [255 * torch.tensor(one) for one in (model.facts.std, model.facts.mean)]
    crops = (normalised.permute(0, 2, 3, 1) * colours[0] + colours[1]).round().to(torch.uint8)
    assert torch.allclose(model(crops), of_files, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run=nothing", "input=."), "error: run=nothing does not exist, and runs has no runs: give the folder of one"),
        (("run=latest", "input=.", "out=a.xlsx"), "error: out=a.xlsx must end in .csv, .jsonl, .parquet"),
        (("run=latest", "input=.", "out=none/a.csv"), "error: out=none/a.csv: there is no folder none"),
        (("run=latest", "input=.", "top=0"), "error: top=0 must be an integer of at least 1"),
        (("run=latest",), "error: input has no default: add input=VALUE"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    answer = run_module(tmp_path, "pipeline.predict", *words)
    assert (answer.returncode, answer.stderr) == (1, message + "\n")


def test_a_place_without_images_is_one_sentence(main_job: FinishedRun) -> None:
    answer = run_module(main_job.root, "pipeline.predict", "run=latest", "input=nowhere")
    assert (answer.returncode, answer.stderr) == (1, "error: input=nowhere does not exist\n")


def test_other_files_of_a_folder_are_counted_and_the_calibration_is_named(
    main_job: FinishedRun, photos: Path, tmp_path: Path
) -> None:
    shutil.copytree(photos / "class1", tmp_path / "mixed")
    for name in ("a.gif", "b.gif", "notes"):
        (tmp_path / "mixed" / name).touch()
    shutil.copytree(main_job.folder, tmp_path / "plain", ignore=shutil.ignore_patterns("evaluation"))
    answer = run_module(tmp_path, "pipeline.predict", "run=plain", "input=mixed")
    assert "ignored files: 2 .gif, 1 suffixless" in answer.stderr
    assert "plain, best.ckpt, resnet18; no temperature and no threshold: evaluate the run to fit them" in answer.stderr


def test_a_model_names_what_it_cannot_take(main_job: FinishedRun, photos: Path) -> None:
    model, file = load(main_job.folder), photos / "class1" / "00.jpg"
    crops = np.zeros((2, 16, 16, 3), np.uint8)
    assert torch.equal(model(crops), model(torch.from_numpy(crops)))
    assert [one.label for one in model.predict(str(file))] == [one.label for one in model.predict([file])]
    assert repr(model) == f"TrainedModel({main_job.folder}: resnet18, 16 px, 10 classes, {model.device})"
    for wrong in (crops.astype(np.float32), crops[0], crops[:, :8], crops.transpose(0, 3, 1, 2)):
        with pytest.raises(ValueError, match=r"^images are torch.* not torch.uint8 \(N, 16, 16, 3\)$"):
            model(wrong)
