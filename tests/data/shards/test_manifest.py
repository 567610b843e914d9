"""The manifest and the indexes: every change is noticed, an edit by a person is accepted on demand."""

from __future__ import annotations

import errno
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.shards.dataset import Dataset
from data.shards.indexing import open_dataset
from data.shards.manifest import read_manifest
from tests.support.paths import ROOT
from tests.support.shards import make_samples, write_tar

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of two indexed splits, with numbers as classes."""
    write_tar(tmp_path / "train-0.tar", make_samples(6))
    write_tar(tmp_path / "train-1.tar", make_samples(3, prefix="b"))
    write_tar(tmp_path / "val-0.tar", make_samples(3))
    open_dataset(tmp_path)
    return tmp_path


def flip(content: bytes, bit: int) -> bytes:
    """Flip a bit, counted from the start."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def without_digest(manifest: Path) -> None:
    """Remove the line, as the message tells a person to."""
    lines = manifest.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(' "digest"')]
    assert len(kept) == len(lines) - 1
    manifest.write_text("".join(kept))


def name_classes(manifest: Path) -> None:
    """Give names to three numbered classes, as a person with an editor does."""
    text = manifest.read_text()
    for number, name in enumerate(("ant", "bee", "cat")):
        assert text.count(f'"{number}"') == 1
        text = text.replace(f'"{number}"', f'"{name}"')
    manifest.write_text(text)


def open_here(folder: Path) -> Dataset:
    return open_dataset(folder)[0]


def test_flipped_bits_of_a_manifest_are_found(tmp_path: Path) -> None:
    root, manifest = tmp_path, tmp_path / "dataset.json"
    write_tar(root / "a.tar", make_samples(3))
    open_dataset(root)
    content = manifest.read_bytes()
    bits = range(0, 8 * len(content), 3)  # of every byte, each of its bits in turn: 3 is odd
    for bit in bits:
        manifest.write_bytes(flip(content, bit))
        with pytest.raises(ValueError, match=r"dataset\.json"):
            read_manifest(root, root)
    assert len(bits) > 2_000
    manifest.write_bytes(content)
    assert read_manifest(root, root).classes == ("0", "1", "2")


def test_flipped_bits_of_an_index_are_found(root: Path) -> None:
    index, before = root / "train.parquet", open_here(root)
    content = index.read_bytes()
    bits = range(0, 8 * len(content), 31)  # each of a byte's bits in turn: 31 is odd
    for bit in bits:
        index.write_bytes(flip(content, bit))
        with pytest.raises(ValueError, match=r"train\.parquet is damaged: remove it to have the tars indexed again$"):
            open_dataset(root)
    assert len(bits) > 500
    index.unlink()
    assert open_here(root) == before
    assert index.read_bytes() == content


def test_nobody_opens_a_data_set_without_its_checks() -> None:
    folders = ("data", "models", "pipeline", "benchmarks")
    readers = [
        path for folder in folders for path in (ROOT / folder).rglob("*.py") if "read_manifest(" in path.read_text()
    ]
    assert sorted(path.name for path in readers) == ["indexing.py", "manifest.py", "pack.py", "remote_index.py"]


def test_an_index_cut_short_or_of_another_split_is_found(root: Path) -> None:
    index = root / "train.parquet"
    content = index.read_bytes()
    for other in (b"", content[:-1], content + b"\0", (root / "val.parquet").read_bytes()):
        index.write_bytes(other)
        with pytest.raises(ValueError, match=r"train\.parquet is damaged"):
            open_dataset(root)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_an_edit_is_refused_until_the_digest_is_removed(root: Path, elsewhere: bool) -> None:
    folder = root / "index" if elsewhere else root
    before, _ = open_dataset(root, folder)
    manifest = folder / "dataset.json"
    name_classes(manifest)
    with pytest.raises(ValueError, match=rf'^{manifest} was edited or is damaged: .* remove its line "digest"'):
        open_dataset(root, folder)
    without_digest(manifest)
    edited, skipped = open_dataset(root, folder)
    assert (edited.classes, skipped) == (("ant", "bee", "cat"), [])
    assert edited.splits == before.splits
    written = manifest.read_bytes()
    assert b'"digest"' in written.splitlines()[1]
    again, _ = open_dataset(root, folder)
    assert again == edited
    assert not again.is_edited
    assert manifest.read_bytes() == written


def test_an_edit_survives_new_tars(root: Path) -> None:
    name_classes(root / "dataset.json")
    without_digest(root / "dataset.json")
    write_tar(root / "train-2.tar", make_samples(3, prefix="c"))
    assert open_here(root).classes == ("ant", "bee", "cat")
    assert open_here(root).splits["train"].samples == 12


def test_processes_that_open_an_edit_at_once_agree(root: Path) -> None:
    name_classes(root / "dataset.json")
    without_digest(root / "dataset.json")
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("forkserver")) as pool:
        opened = list(pool.map(open_here, [root] * 16))
    assert len(opened) == 16
    assert all(one == opened[0] for one in opened)
    assert opened[0].classes == ("ant", "bee", "cat")
    assert not read_manifest(root, root).is_edited


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EROFS])
def test_an_edit_is_read_where_nothing_can_be_written(root: Path, monkeypatch: pytest.MonkeyPatch, reason: int) -> None:
    def refuse(path: Path, seconds: float) -> None:
        raise OSError(reason, "no", str(path))

    name_classes(root / "dataset.json")
    without_digest(root / "dataset.json")
    written = (root / "dataset.json").read_bytes()
    monkeypatch.setattr("data.shards.indexing.file_lock", refuse)
    assert open_here(root).classes == ("ant", "bee", "cat")
    assert (root / "dataset.json").read_bytes() == written


def change_manifest(root: Path, change: Change) -> None:
    """Change a manifest, without its digest."""
    manifest = json.loads((root / "dataset.json").read_text())
    del manifest["digest"]
    change(manifest)
    (root / "dataset.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest["classes"].pop(), "it has 2 classes, but .*train.parquet has labels up to 2"),
        (
            lambda manifest: manifest["splits"]["train"]["shards"].reverse(),
            "its shards are not those of .*train.parquet",
        ),
    ],
)
def test_an_edit_that_does_not_fit_the_index_is_refused(root: Path, change: Change, message: str) -> None:
    change_manifest(root, change)
    with pytest.raises(ValueError, match=rf"dataset\.json was edited: {message}"):
        open_dataset(root)


def test_an_older_manifest_has_its_tars_indexed_again(root: Path) -> None:
    before = open_here(root)

    def make_older(manifest: dict[str, Any]) -> None:
        manifest["classes"] = ["ant", "bee", "cat"]
        for split in manifest["splits"].values():
            del split["index_sha256"], split["origin"]

    change_manifest(root, make_older)
    index = root / "val.parquet"
    index.write_bytes(flip(index.read_bytes(), 400))  # nothing protects it
    again = open_here(root)
    assert again.classes == ("ant", "bee", "cat")
    assert again.splits == before.splits
    assert len(again.index("val").rows(np.arange(3)).label) == 3


NOT_MANIFESTS = {
    "nothing": b"",
    "an open brace": b"{",
    "a number": b"7",
    "null": b"null",
    "a list": b"[]",
    "no UTF-8": b'{"name": "\xff\xfe"}',
    "UTF-16": '{"format": 1}'.encode("utf-16"),
    "half a surrogate": b'{"format": 1, "name": "\\ud800", "digest": "x"}',
    "a deep list": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a long number": b'{"format": ' + b"9" * 10_000 + b"}",
    "NaN": b'{"format": NaN}',
}


@pytest.mark.parametrize("content", NOT_MANIFESTS.values(), ids=NOT_MANIFESTS.keys())
def test_anything_else_than_a_manifest_is_named(root: Path, content: bytes) -> None:
    (root / "dataset.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"dataset\.json is not the manifest of a data set \(.*: restore it, or"):
        open_dataset(root)


WRONG_FACTS = {
    "classes": [None, "012", [], [1, 2, 3], ["0", "1", "1"], {"0": 1}],
    "mean": [0.5, [0.5], [0.5, 0.5, "0.5"], [0.5, 0.5, True], [0.5, 0.5, 1e999], [0.5, 0.5, 10**400]],
    "std": [[0.2, 0.2, 0.0], [0.2, 0.2, -0.1], [[0.2], 0.2, 0.2]],
    "name": [None, 7, ["a"]],
    "format": [None, "1", 1.0, True, [1]],
    "splits": [[], {}, {"train": []}, {"train": None}, {"holdout": {}}],
    "new": [1],
}
WRONG_IN_A_SPLIT = {
    "samples": [-9, 9.0, "9", None, 10**30, True],
    "shards": [[], {}, "train-0.tar", [[]], [None]],
    "index": [None, 3, ""],
    "digest": [None, 3],
    "index_sha256": [None, 3],
    "origin": [None, []],
    "new": [1],
}
WRONG_IN_A_SHARD = {
    "file": [None, 3, "", ["train-0.tar"]],
    "samples": [-6, 0, "6", 6.0, None, 10**30],
    "bytes": [-1, "1", None],
    "sha256": [None, 7],
    "new": [1],
}


def assert_refused(root: Path, change: Change) -> None:
    before = (root / "dataset.json").read_bytes()
    change_manifest(root, change)
    with pytest.raises(ValueError, match=r"^[^ ]*dataset\.json (is not the manifest|has format)"):
        open_dataset(root)
    (root / "dataset.json").write_bytes(before)


def test_wrong_values_are_named(root: Path) -> None:
    count = 0
    for name, values in WRONG_FACTS.items():
        for value in values:
            assert_refused(root, lambda manifest, name=name, value=value: manifest.update({name: value}))
            count += 1
    for name, values in WRONG_IN_A_SPLIT.items():
        for value in values:
            assert_refused(
                root, lambda manifest, name=name, value=value: manifest["splits"]["train"].update({name: value})
            )
            count += 1
    for name, values in WRONG_IN_A_SHARD.items():
        for value in values:
            assert_refused(
                root,
                lambda manifest, name=name, value=value: manifest["splits"]["train"]["shards"][0].update({name: value}),
            )
            count += 1
    assert count > 50


def test_missing_fields_are_named(root: Path) -> None:
    for name in ("format", "name", "classes", "mean", "std", "splits"):
        assert_refused(root, lambda manifest, name=name: manifest.pop(name))
    for name in ("samples", "shards", "index", "digest", "index_sha256", "origin"):
        assert_refused(root, lambda manifest, name=name: manifest["splits"]["val"].pop(name))
    for name in ("file", "samples", "bytes", "sha256"):
        assert_refused(root, lambda manifest, name=name: manifest["splits"]["val"]["shards"][0].pop(name))


@pytest.mark.parametrize(
    "file",
    ["/etc/passwd", "../other/train-0.tar", "a/../../b.tar", "pipe:cat train-0.tar", "PIPE:ls", "s3://bucket/a.tar",
     "file:/etc/passwd", "https://host/a.tar", ".", "a\0.tar"],
)  # fmt: skip
def test_paths_that_lead_out_of_the_folder_are_refused(root: Path, file: str) -> None:
    shown = json.dumps(file).replace("\\", r"\\")
    before = (root / "dataset.json").read_bytes()
    for change in (
        lambda manifest: manifest["splits"]["train"]["shards"][0].update(file=file),
        lambda manifest: manifest["splits"]["val"].update(index=file),
    ):
        change_manifest(root, change)
        with pytest.raises(ValueError, match=f"names {shown}, which is not a file inside the data set's folder"):
            open_dataset(root)
        (root / "dataset.json").write_bytes(before)


def test_a_colon_in_a_name_is_no_scheme(tmp_path: Path) -> None:
    write_tar(tmp_path / "2024-05-01T12:30.tar", make_samples(3))
    assert open_here(tmp_path) == open_here(tmp_path)
    assert open_here(tmp_path).splits["train"].shards[0].file == "2024-05-01T12:30.tar"
