"""A file from a stranger runs nothing and leaks nothing: each here would leave a marker if something in it ran."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from torch import nn

from data.shards.dataset import Dataset
from data.shards.indexing import open_dataset
from pipeline.cli.errors import ConfigError
from pipeline.evaluate import __main__ as evaluate
from pipeline.predict import __main__ as predict
from pipeline.report import __main__ as report
from pipeline.runs.calibration import digest
from pipeline.runs.checkpoints import Checkpoint, CheckpointFolder
from pipeline.runs.restore import RestoredRun
from pipeline.tracking.mlflow_tracker import MLflowTracker
from pipeline.train import __main__ as train
from tests.support.hostile import COMMAND, MARKER, SECRET, Bomb, answer_of, assert_refused, texts_below, write_run
from tests.support.images import make_jpeg
from tests.support.shards import make_samples, write_tar

DEEP = 100_000
CALL = f"{{_target_: os.system, command: {COMMAND}}}"


def write_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb()))


def write_checkpoint(path: Path) -> None:
    """As torch writes one, with the object among the tensors."""
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "hyper_parameters": Bomb()}, path)


def write_program(path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(path)


def write_legacy_tar(path: Path) -> None:
    """As torch wrote files before 0.1.10; its reader extracts members."""
    write_tar(path, {"../../ran": b"", "storages": b"", "tensors": b"", "pickle": pickle.dumps(Bomb())})


def write_huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")


def write_array(path: Path) -> None:
    np.save(path.open("wb"), np.array([Bomb()], dtype=object), allow_pickle=True)


# Writers of files of weights, by suffix.
WEIGHTS: list[tuple[str, Callable[[Path], None]]] = [
    (".ckpt", write_pickle),
    (".pth", write_pickle),
    (".pt", write_checkpoint),
    (".safetensors", write_pickle),
    (".safetensors", write_huge_header),
    (".pt", write_program),
    (".pth", write_legacy_tar),
    (".pt", write_array),
    (".npy", write_array),
]
# Changes of the config that a run has recorded: from, to, and a part of the answer.
RECORDS = [
    ("_target_: models.sequential.lenet", "_target_: os.system", "model._target_=os.system is outside models"),
    ("dropout: null", f"dropout: {CALL}", "model.dropout._target_=os.system is outside models"),
    ("_target_: pipeline.tracking.mlflow_tracker.MLflowTracker", "_target_: os.system", "tracking._target_=os.system"),
    ("_target_: pipeline.build.data.DataConfig", "_target_: torch.hub.load", "data._target_=torch.hub.load is outside"),
    ("dropout: null", f"dropout: !!python/object/apply:os.system ['{COMMAND}']", "could not determine a constructor"),
    ("dropout: null", f"dropout: '${{oc.decode:\"{CALL}\"}}'", "refers to other values or is"),
    ("dropout: null", "dropout: ${oc.env:MY_PASSWORD}", "refers to other values or is"),
    ("dropout: null", "dropout: [&a [x], *a]", "refers to other values or is"),
    ("dropout: null", f"dropout: {'[' * DEEP}", "is nested deeply, as no config of a run does"),
    ("dropout: null", "dropout: null\ntrust: true", "has trust=True, which does not count there: add trust=true"),
]
# Files of a run's folder, and a part of the answer.
PARTS = [
    ("fingerprint.json", "[" * DEEP, "is damaged"),
    ("evaluation/calibration.json", "[" * DEEP, "is damaged"),
]


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a stranger's run and an image, and a secret in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_PASSWORD", SECRET)
    write_run(tmp_path / "theirs")
    (tmp_path / "a.jpg").write_bytes(make_jpeg(40, 40))
    return tmp_path


def test_enough_is_tried() -> None:
    assert len(WEIGHTS) + len(RECORDS) + len(PARTS) >= 20


def test_the_run_is_a_run(stranger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer_of(predict.VERB, predict.main, ["run=theirs", "input=a.jpg"])
    assert "a.jpg," in capsys.readouterr().out


@pytest.mark.parametrize(("suffix", "write"), WEIGHTS)
def test_a_file_of_weights_runs_nothing(
    suffix: str, write: Callable[[Path], None], stranger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = stranger / f"bomb{suffix}"
    write(file)
    words = ["+model=lenet", f"weights={file.name}", "effective_images=1", "data.image_size=32"]
    sentence = assert_refused(lambda: answer_of(report.VERB, report.main, words), capsys, folder=stranger)
    assert file.name in sentence
    if suffix != ".npy":
        file.replace(stranger / "theirs" / "checkpoints" / "last.ckpt")
        words = ["run=theirs", "input=a.jpg"]
        sentence = assert_refused(lambda: answer_of(predict.VERB, predict.main, words), capsys, folder=stranger)
        assert "last.ckpt" in sentence


@pytest.mark.parametrize(("before", "after", "answer"), RECORDS, ids=[after[:60] for _, after, _ in RECORDS])
def test_a_recorded_config_runs_nothing(
    before: str, after: str, answer: str, stranger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = stranger / "theirs" / "config.yaml"
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after.split("\n", maxsplit=1)[0], 1) + "\n".join(["", *after.split("\n")[1:]]))
    for verb in (predict, report, evaluate):
        words = ["run=theirs", *(["input=a.jpg"] if verb is predict else [])]
        call = partial(answer_of, verb.VERB, verb.main, words)
        assert answer in assert_refused(call, capsys, folder=stranger)


@pytest.mark.parametrize(("name", "text", "answer"), PARTS, ids=[name for name, _, _ in PARTS])
def test_a_file_of_a_run_that_is_nested_without_end_is_refused(
    name: str, text: str, answer: str, stranger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = stranger / "theirs" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    words = ["run=theirs", "input=a.jpg"]
    sentence = assert_refused(lambda: answer_of(predict.VERB, predict.main, words), capsys, folder=stranger)
    assert answer in sentence


def test_hooks_in_a_recorded_config_are_not_read(stranger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = stranger / "theirs" / "config.yaml"
    text = file.read_text()
    assert "callbacks: {}" in text
    hooks = f"hydra: {{callbacks: {{x: {CALL}}}, job: {{env_set: {{LD_PRELOAD: ./ran.so}}}}}}\ncallbacks: {{x: {CALL}}}"
    file.write_text(text.replace("callbacks: {}", hooks))
    answer_of(predict.VERB, predict.main, ["run=theirs", "input=a.jpg"])
    assert "a.jpg," in capsys.readouterr().out
    assert not (stranger / MARKER).exists()


def test_a_checkpoint_of_a_training_runs_nothing(
    stranger: Path, digits: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(digits.root, stranger / "datasets" / "digits")
    words = ["+model=lenet", "recipe.epochs=1", "+trainer.limit_train_batches=1", "tracking=none", "name=mine"]
    answer_of(train.VERB, train.main, words)
    (stranger / "runs" / "mine" / "result.json").unlink()
    for write in (write_pickle, write_checkpoint):
        file = stranger / "runs" / "mine" / "checkpoints" / "step-1.ckpt"
        write(file)
        CheckpointFolder(file.parent).describe(Checkpoint(1, file.stat().st_size, digest(file)))
        sentence = assert_refused(partial(answer_of, train.VERB, train.main, words), capsys, folder=stranger)
        assert "step-1.ckpt cannot be read (" in sentence


def test_an_id_in_mlflow_may_be_anything(stranger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A path as the id of a run, and a server that would be sent credentials."""
    folder = stranger / "theirs"
    (folder / "mlflow_run_id").write_text("../../../../etc/passwd\n")
    sentence = assert_refused(
        partial(answer_of, evaluate.VERB, evaluate.main, ["run=../../etc/passwd"]), capsys, folder=stranger
    )
    assert "does not exist" in sentence
    answer_of(predict.VERB, predict.main, ["run=theirs", "input=a.jpg"])
    assert "root:" not in capsys.readouterr().out
    assert RestoredRun(folder).run.tracking_id == ""


def test_credentials_are_not_sent_to_a_server_that_a_run_names(stranger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(stranger / "remote", "tracking.uri=http://stranger")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert RestoredRun(run).build_tracking(MLflowTracker) is not None
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    with pytest.raises(ConfigError, match="would be sent your credentials for MLflow: set MLFLOW_TRACKING_URI"):
        RestoredRun(run).build_tracking(MLflowTracker)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://stranger/")
    assert RestoredRun(run).build_tracking(MLflowTracker) is not None


def test_a_password_in_an_address_is_not_recorded_and_comes_from_the_environment(
    stranger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"postgresql://me:{SECRET}@db/mlflow"
    run = write_run(stranger / "mine", f"tracking.uri='{address}'")
    assert SECRET not in texts_below(run)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(
        ValueError, match=r"me:\*\*\*@db/mlflow is recorded without its password: set MLFLOW_TRACKING_URI"
    ):
        RestoredRun(run).build_tracking(MLflowTracker)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    tracker = RestoredRun(run).build_tracking(MLflowTracker)
    assert tracker is not None
    assert tracker.store.uri == address
    assert SECRET not in tracker.store.printed_address


def members_of_a_hostile_tar(outside: Path) -> list[tarfile.TarInfo]:
    """Links out of the folder, absolute and relative names that leave it, and members that are no files."""
    members = []
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    for number, kind in enumerate(kinds):
        member = tarfile.TarInfo(f"{number}.jpg")
        member.type, member.linkname = kind, str(outside)
        members.append(member)
    return members


def test_a_tar_is_read_and_nothing_in_it_is_followed(stranger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outside = stranger / "outside.jpg"
    outside.write_bytes(make_jpeg(24, 24, seed=9))
    (stranger / "tars").mkdir()
    with tarfile.open(stranger / "tars" / "train.tar", "w") as tar:
        for member in members_of_a_hostile_tar(outside):
            tar.addfile(member)
        for name, content in {
            **{f"../{name}": content for name, content in make_samples(4).items()},
            **{f"/tmp/{name}": content for name, content in make_samples(4).items()},
            "deep.jpg": make_jpeg(24, 24),
            "deep.json": b"[" * DEEP,
            "bomb.png": png_bomb(),
            "bomb.cls": b"0",
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    before = sorted(path for path in stranger.rglob("*") if path.parent.name != "tars")
    dataset, skipped = open_dataset(stranger / "tars")
    assert dataset.splits["train"].samples == 8
    reasons = {sample.name.rpartition(": ")[2]: sample.reason for sample in skipped}
    assert reasons.keys() == {"deep", "bomb"}
    assert reasons["deep"] == "its .json is nested too deeply"
    assert "3600000000 pixels" in reasons["bomb"]
    keys = dataset.index("train").keys(range(8))
    assert sum("../" in key or "/tmp/" in key for key in keys) >= 4, "names are only names"
    assert sorted(path for path in stranger.rglob("*") if path.parent.name != "tars") == before
    with pytest.raises(SystemExit) as end:
        answer_of(predict.VERB, predict.main, ["run=theirs", "input=tars/train.tar"])
    assert end.value.code == 2, "the bomb could not be read"
    rows = capsys.readouterr().out.splitlines()
    assert len([row for row in rows if "train.tar/" in row]) == 10, "eight, deep.jpg and the bomb, which is an error"


def test_a_manifest_may_not_leave_its_folder(stranger: Path) -> None:
    for change in ({"file": "../outside.tar"}, {"file": "/etc/passwd"}, {"index": "../train.parquet"}):
        write_tar(stranger / "set" / "train.tar", make_samples(4))
        open_dataset(stranger / "set")
        manifest = json.loads((stranger / "set" / "dataset.json").read_text())
        split = manifest["splits"]["train"]
        (split if "index" in change else split["shards"][0]).update(change)
        del manifest["digest"]  # which does not sign anything
        (stranger / "set" / "dataset.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match="which is not a file inside the data set's folder"):
            open_dataset(stranger / "set")
        shutil.rmtree(stranger / "set")


@pytest.mark.parametrize("text", ["[" * DEEP, "[]", '{"format": 1, "splits": [1]}'])
def test_a_manifest_that_is_none_is_refused(text: str, stranger: Path) -> None:
    write_tar(stranger / "set" / "train.tar", make_samples(4))
    (stranger / "set" / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match="is not the manifest of a data set"):
        open_dataset(stranger / "set")


def png_bomb() -> bytes:
    """A PNG of 70 bytes that declares 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_bomb() -> bytes:
    """A JPEG whose header declares 65,000 x 65,000 pixels."""
    content = make_jpeg(16, 16)
    start = content.index(b"\xff\xc0") + 5
    return content[:start] + struct.pack(">HH", 65_000, 65_000) + content[start + 4 :]


def test_an_image_that_declares_too_many_pixels_is_an_error(stranger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stranger / "bomb.png").write_bytes(png_bomb())
    (stranger / "bomb.jpg").write_bytes(jpeg_bomb())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("bomb.png", "bomb.jpg"):
        with pytest.raises(SystemExit) as end:
            answer_of(predict.VERB, predict.main, ["run=theirs", f"input={name}"])
        assert end.value.code == 2, "no image could be read"
        printed = capsys.readouterr().out
        assert "pixels" in printed
        assert "exceeds limit" in printed
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000, "in KiB: 12 GB if it were decoded"


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n%%EOF\n"


def test_an_image_is_decoded_by_its_own_decoder_only(
    stranger: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PIL would start Ghostscript for EPS, whatever the name of the file."""
    (stranger / "gs").write_text(f"#!/bin/sh\n{COMMAND}\n")
    (stranger / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(stranger), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    (stranger / "theirs.jpg").write_bytes(EPS)
    with suppress(OSError):
        Image.open(stranger / "theirs.jpg").load()
    assert (stranger / MARKER).exists(), "PIL alone runs it"
    (stranger / MARKER).unlink()
    words = ["+model=lenet", "data.image_size=32", "photographs=theirs.jpg"]
    sentence = assert_refused(partial(answer_of, report.VERB, report.main, words), capsys, folder=stranger)
    assert "photographs: theirs.jpg cannot be read" in sentence
    with pytest.raises(SystemExit):
        answer_of(predict.VERB, predict.main, ["run=theirs", "input=theirs.jpg"])
    assert "not a JPEG, PNG or WebP image" in capsys.readouterr().out
    assert not (stranger / MARKER).exists()
