"""The index verb as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.commands import Run
from tests.support.shards import make_samples, write_tar


def test_an_index_is_made_once_and_again_for_changed_tars(run_verb: Run, tmp_path: Path) -> None:
    write_tar(tmp_path / "tars" / "train-0.tar", make_samples(12))
    answer = run_verb("index", "tars", "out=index")
    assert answer.returncode == 0, answer.stderr
    assert "train 12 (tars: 1)" in answer.stdout
    assert answer.stdout.endswith("+model=resnet data=shards data.root=tars data.index=index\n")
    assert sorted(path.name for path in (tmp_path / "tars").iterdir()) == ["train-0.tar"]
    manifest = tmp_path / "index" / "dataset.json"
    written = manifest.stat().st_mtime_ns
    assert run_verb("index", "tars", "out=index").returncode == 0
    assert manifest.stat().st_mtime_ns == written
    write_tar(tmp_path / "tars" / "train-1.tar", make_samples(5))
    assert "train 17 (tars: 2)" in run_verb("index", "root=tars", "out=index").stdout
    assert json.loads(manifest.read_text())["splits"]["train"]["samples"] == 17


def test_a_mistake_is_one_sentence(run_verb: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for words, message in (
        (["nowhere"], "error: root=nowhere is not a folder"),
        (["empty"], "error: root=empty is not a data set: it contains neither dataset.json nor a .tar file"),
        ([], "error: root has no default: add root=VALUE"),
    ):
        answer = run_verb("index", *words)
        assert answer.returncode == 1
        assert answer.stderr.startswith(message)
        assert answer.stderr.count("\n") == 1
