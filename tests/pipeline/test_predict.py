"""Predictions of a run: the verb, its formats, and the same model in plain Python."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from data.loading.inputs import file_source
from pipeline import load
from pipeline.predict import __main__ as verb
from pipeline.runs.calibration import Calibration
from pipeline.runs.trained import TrainedModel
from tests.support.commands import FinishedRun, call_verb, run_module
from tests.support.images import make_folder
from tests.support.paths import ROOT
from tests.support.saving import replace_checkpoint

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
        (("run=latest", "input=.", "top=0"), "error: top=0 must be an integer from 1 to 65,536"),
        (("run=latest",), "error: input has no default: add input=VALUE"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    answer = run_module(tmp_path, "pipeline.predict", *words)
    assert (answer.returncode, answer.stderr) == (1, message + "\n")


def test_a_batch_that_memory_cannot_hold_is_one_sentence(
    main_job: FinishedRun, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(TrainedModel, "decode", decode)
    with pytest.raises(ValueError, match=r"^a batch of 64 images does not fit into the memory of this machine: lower"):
        call_verb(verb.VERB, verb.main, [f"run={main_job.folder}", f"input={photos}"])


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


def test_a_file_appears_complete_or_not_at_all(main_job: FinishedRun, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.csv"
    out.write_text("earlier\n")
    damaged = shutil.copytree(main_job.folder, tmp_path / "damaged", ignore=shutil.ignore_patterns("evaluation"))
    file = damaged / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["state_dict"] = {name: value * 1e37 for name, value in checkpoint["state_dict"].items()}
    replace_checkpoint(file, checkpoint)
    answer = run_module(tmp_path, "pipeline.predict", "run=damaged", f"input={photos}", f"out={out}")
    assert answer.returncode == 1
    assert "damaged/checkpoints/best.ckpt gives NaN: its training has diverged" in answer.stderr
    assert out.read_text() == "earlier\n"
    answer = run_module(tmp_path, "pipeline.predict", f"run={main_job.folder}", f"input={out}", f"out={out}")
    assert answer.stderr == f"error: out={out} is the input: give another file\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.csv", "damaged"]


def test_names_that_are_no_text_and_damaged_tars_are_rows(main_job: FinishedRun, photos: Path, tmp_path: Path) -> None:
    content = (photos / "class1" / "00.jpg").read_bytes()
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(content)
    (folder / "gone.jpg").symlink_to("nowhere")
    with tarfile.open(folder / "b.tar", "w") as tar:
        for name in ("0.jpg", "1.jpg", "2.jpg"):
            tar.add(photos / "class1" / f"0{name}", name)
    bytes_of_tar = bytearray((folder / "b.tar").read_bytes())
    bytes_of_tar[bytes_of_tar.index(b"1.jpg\0")] ^= 1  # the checksum of its header is wrong now
    (folder / "b.tar").write_bytes(bytes_of_tar)
    (folder / "c.tar").write_bytes(gzip.compress(bytes(bytes_of_tar)))
    for suffix in ("csv", "jsonl", "parquet"):
        words = (f"run={main_job.folder}", "input=mixed", f"out=out.{suffix}", "top=1")
        answer = run_module(tmp_path, "pipeline.predict", *words)
        assert answer.returncode == 2, answer.stderr
    rows = {row["path"]: row for row in pq.read_table(tmp_path / "out.parquet").to_pylist()}
    assert list(rows) == ["mixed/b.tar/0.jpg", "mixed/b.tar", "mixed/c.tar", "mixed/caf\\xe9.jpg", "mixed/gone.jpg"]
    assert [row["error"] is None for row in rows.values()] == [True, False, False, True, False]
    assert rows["mixed/b.tar"]["error"].startswith("the tar is damaged, or compressed: ")
    with (tmp_path / "out.csv").open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == list(rows)
