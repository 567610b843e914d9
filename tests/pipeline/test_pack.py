"""The pack verb as it is typed."""

from __future__ import annotations

from pathlib import Path

from data.shards.indexing import open_dataset
from tests.support.commands import Run
from tests.support.images import make_folder


def test_pack_reports_images_and_skipped_files(run_verb: Run, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "photos", classes=2, images=10)
    (root / "class1" / "07.jpg").write_bytes(b"\xff\xd8 cut")
    answer = run_verb("pack", "source=folder", f"source.root={root}", "name=pets", "val_fraction=0.3")
    assert answer.returncode == 0, answer.stderr
    dataset, _ = open_dataset(tmp_path / "datasets" / "pets")
    assert {name: split.samples for name, split in dataset.splits.items()} == {"train": 14, "val": 5}
    assert "skipped: " in answer.stdout
    assert "class1/07.jpg" in answer.stdout
    assert "1 skipped in all" in answer.stdout
    assert "data.root=datasets/pets" in answer.stdout


def test_packed_digits_are_trained_with_their_own_config(run_verb: Run) -> None:
    answer = run_verb("pack")
    assert answer.returncode == 0, answer.stderr
    assert "train 1,438 (tars: 2), val 359 (tars: 1)" in answer.stdout
    assert answer.stdout.endswith("python -m pipeline.train +model=resnet data=digits\n")


def test_a_mistake_is_one_sentence(run_verb: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for words, message in (
        (["source=folder", "source.root=empty", "name=pets"], "error: empty contains no class folders"),
        (["source=folder", "source.root=nowhere", "name=pets"], "error: source.root=nowhere is not a folder"),
        (["name=../evil"], "error: name=../evil is a path: out=FOLDER sets the"),
        (["source=folder"], "error: name has no default: add name=VALUE"),
    ):
        answer = run_verb("pack", *words)
        assert answer.returncode == 1
        assert answer.stderr.startswith(message)
        assert answer.stderr.count("\n") == 1
