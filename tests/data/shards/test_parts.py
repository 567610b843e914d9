"""Parts of a data set, packed or indexed by several processes, are the bytes that one process writes."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data.shards import parallel, sources
from data.shards.dataset import Dataset
from data.shards.images import UnreadableImage
from data.shards.index_writer import GROUP_ROWS
from data.shards.indexing import check_parts, index_part, open_dataset
from data.shards.pack import PackSettings, merge_parts, pack, pack_part
from data.shards.parallel import MERGE, Part, parse_part
from data.shards.sources import Source
from data.shards.tars import read_shard
from tests.support.images import make_folder

SETTINGS = PackSettings(seed=3, shard_samples=5)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    root = make_folder(tmp_path / "images", images=20)
    damaged = root / "class1" / "03.jpg"
    damaged.write_bytes(damaged.read_bytes()[:200])
    return sources.folder(root, "images", val_fraction=0.25, seed=0)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a data set, without what depends on the time of writing."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(found["dataset.json"])
    del manifest["digest"]
    for split in manifest["splits"].values():
        del split["origin"]
    return found | {"dataset.json": json.dumps(manifest).encode()}


def copy_tars(dataset: Dataset, folder: Path) -> Path:
    folder.mkdir()
    for path in dataset.folder.glob("*.tar"):
        shutil.copy2(path, folder)
    return folder


def test_packed_parts_are_the_bytes_of_one_packing(source: Source, tmp_path: Path) -> None:
    alone = pack(source, tmp_path / "a" / "images", settings=SETTINGS)
    folder = tmp_path / "b" / "images"
    counts = [pack_part(source, folder, part=Part(number, 4), settings=SETTINGS) for number in (4, 2, 1, 3)]
    assert sum(counts) == 12
    assert not folder.exists(), "a data set appears complete"
    merged = merge_parts(source, folder, settings=SETTINGS)
    assert contents(folder) == contents(tmp_path / "a" / "images")
    assert len(contents(folder)) == 12 + 3
    assert merged.skipped == alone.skipped
    assert [Path(one.name).name for one in merged.skipped] == ["03.jpg"]
    assert list(folder.parent.iterdir()) == [folder]


def test_a_missing_part_is_named(source: Source, tmp_path: Path) -> None:
    for number in (1, 3):
        pack_part(source, tmp_path / "images-packed", part=Part(number, 3), settings=SETTINGS)
    with pytest.raises(ValueError, match=r"4 of 12 shards are missing, train-000001.tar is the first: run their parts"):
        merge_parts(source, tmp_path / "images-packed", settings=SETTINGS)
    pack(source, tmp_path / "images-packed", settings=SETTINGS)  # a packing of all writes what is missing
    assert (tmp_path / "images-packed" / "dataset.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 4}, "was begun with seed=3: continue with the same"),
        ({"shard_samples": 6}, "was begun with shard_samples=5: continue"),
        ({"resize": 20}, "was begun with resize=None: continue"),
    ],
)
def test_parts_of_other_values_are_not_mixed(
    source: Source, tmp_path: Path, options: dict[str, int], message: str
) -> None:
    pack_part(source, tmp_path / "out", part=Part(1, 2), settings=SETTINGS)
    with pytest.raises(ValueError, match=message):
        pack_part(
            source,
            tmp_path / "out",
            part=Part(2, 2),
            settings=PackSettings(**{"seed": 3, "shard_samples": 5} | options),
        )


def test_a_strict_packing_does_not_continue_one_that_has_skipped_an_image(source: Source, tmp_path: Path) -> None:
    pack_part(source, tmp_path / "out", part=Part(1, 1), settings=SETTINGS)
    with pytest.raises(UnreadableImage, match=r"class1/03\.jpg"):
        merge_parts(source, tmp_path / "out", settings=replace(SETTINGS, strict=True))
    assert len(merge_parts(source, tmp_path / "out", settings=SETTINGS).skipped) == 1


def test_parts_of_other_images_are_not_mixed(source: Source, tmp_path: Path) -> None:
    pack_part(source, tmp_path / "out", part=Part(1, 2), settings=SETTINGS)
    (tmp_path / "images" / "class2" / "07.jpg").rename(tmp_path / "images" / "class2" / "70.jpg")
    changed = sources.folder(tmp_path / "images", "images", val_fraction=0.25, seed=0)
    with pytest.raises(ValueError, match=r"was begun with other images or names \(train\)"):
        pack_part(changed, tmp_path / "out", part=Part(2, 2), settings=SETTINGS)


PACK = """
import sys
from pathlib import Path
from data.shards import parallel, sources
from data.shards.pack import PackSettings, pack
source = sources.folder(Path(sys.argv[1]), "images", val_fraction=0.25, seed=0)
pack(source, Path(sys.argv[2]), settings=PackSettings(seed=3, shard_samples=5))
"""


def test_a_killed_packing_continues(source: Source, tmp_path: Path) -> None:
    pack(source, tmp_path / "a" / "images", settings=SETTINGS)
    folder, partial = tmp_path / "b" / "images", tmp_path / "b" / ".images.partial"
    command = [sys.executable, "-c", PACK, str(tmp_path / "images"), str(folder)]
    written, kills = set[Path](), 0
    for wanted in (1, 4, 9):
        with subprocess.Popen(command) as process:
            while len(list(partial.glob("*.tar"))) < wanted and process.poll() is None:
                time.sleep(0.0005)
            process.send_signal(signal.SIGKILL)
        kills += process.returncode == -signal.SIGKILL
        kept = set(partial.glob("*.tar"))
        assert len(kept) >= wanted or folder.exists()
        assert written <= kept or folder.exists()
        written = kept
    assert kills > 0
    if not folder.exists():
        pack(source, folder, settings=SETTINGS)
    assert contents(folder) == contents(tmp_path / "a" / "images")
    assert list(folder.parent.iterdir()) == [folder]


def test_shards_that_are_there_are_not_written_again(source: Source, tmp_path: Path) -> None:
    folder, partial = tmp_path / "images-packed", tmp_path / ".images-packed.partial"
    pack_part(source, folder, part=Part(1, 2), settings=SETTINGS)
    before = {path.name: path.stat().st_ino for path in partial.glob("*.tar")}
    assert len(before) == 6
    (partial / "train-000000.tar").write_bytes(b"damaged")
    pack(source, folder, settings=SETTINGS)
    after = {name: (folder / name).stat().st_ino for name in before}
    assert [name for name in before if before[name] != after[name]] == ["train-000000.tar"]


def test_two_packings_of_one_folder_do_not_mix(source: Source, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=pack, args=(source, tmp_path / "out"), kwargs={"settings": SETTINGS}) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(process.exitcode for process in processes) == [0, 1, 1]
    alone = pack(source, tmp_path / "alone", settings=SETTINGS).dataset
    assert contents(tmp_path / "out") == contents(alone.folder)


def test_indexed_parts_are_the_bytes_of_one_indexing(source: Source, tmp_path: Path) -> None:
    tars = copy_tars(pack(source, tmp_path / "packed", settings=SETTINGS).dataset, tmp_path / "tars")
    alone, _ = open_dataset(tars, tmp_path / "alone")
    for number in (3, 1, 2):
        with pytest.raises(ValueError, match=r"\d+ tars have not been read, (train|val)-00000\d.tar is the first"):
            check_parts(tars, tmp_path / "parts")
        assert index_part(tars, tmp_path / "parts", part=Part(number, 3)) == 4
    check_parts(tars, tmp_path / "parts")
    merged, _ = open_dataset(tars, tmp_path / "parts")
    assert merged.splits == alone.splits
    files = [
        {path.name: path.read_bytes() for path in folder.glob("[!.]*")} for folder in (alone.folder, merged.folder)
    ]
    assert files[0] == files[1]
    assert len(files[0]) == 3
    index_part(tars, tmp_path / "parts", part=Part(1, 3))
    assert not (tmp_path / "parts" / ".rows").exists(), "a complete index needs no part"


def test_a_stopped_indexing_continues(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tars = copy_tars(pack(source, tmp_path / "packed", settings=SETTINGS).dataset, tmp_path / "tars")
    monkeypatch.setattr("data.shards.indexing.POOL_SHARDS", 100)  # in this process
    index_part(tars, None, part=Part(1, 2))
    read: list[str] = []

    def note(root: Path, task: object, **options: object) -> object:
        read.append(task.file)
        return read_shard(root, task, **options)

    monkeypatch.setattr("data.shards.indexing.read_shard", note)
    changed = tars / "train-000000.tar"
    os.utime(changed, ns=(1, 1))  # read before, and another one now
    dataset, skipped = open_dataset(tars)
    assert len(read) == 6 + 1
    assert changed.name in read
    assert len(dataset.index("train")) == 44 - len(skipped)
    assert not (tars / ".rows").exists()


def test_a_damaged_file_of_rows_is_named(source: Source, tmp_path: Path) -> None:
    tars = copy_tars(pack(source, tmp_path / "packed", settings=SETTINGS).dataset, tmp_path / "tars")
    index_part(tars, None, part=Part(1, 1))
    path = sorted((tars / ".rows").iterdir())[5]
    content = bytearray(path.read_bytes())
    content[40] ^= 8
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path.name} is damaged: remove it to have its tar read again"):
        open_dataset(tars)
    path.unlink()
    assert len(open_dataset(tars)[0].index("val")) == 15


def test_row_groups_have_a_fixed_size(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert GROUP_ROWS == 8_192
    plain = pack(source, tmp_path / "plain", settings=SETTINGS).dataset
    monkeypatch.setattr("data.shards.index_writer.GROUP_ROWS", 12)
    small = pack(source, tmp_path / "small", settings=SETTINGS).dataset
    metadata = pq.read_metadata(tmp_path / "small" / "train.parquet")
    assert [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)] == [12, 12, 12, 8]
    assert small.splits["train"].digest == plain.splits["train"].digest
    samples = range(44)
    assert small.index("train").keys(samples) == plain.index("train").keys(samples)
    assert list(small.index("train").names()) == list(plain.index("train").names())
    read = pq.read_table(tmp_path / "small" / "train.parquet")
    assert read.equals(pq.read_table(tmp_path / "plain" / "train.parquet"))


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "1/0", "a/b", "merged", "-1/2", "1/2/3", "٣/٤"])
def test_an_impossible_part_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"part={text} is (not one of|neither a part)"):
        parse_part(text)


def test_parts_share_the_work_completely() -> None:
    assert parse_part(MERGE) is None
    assert parse_part("3/16") == Part(3, 16)
    shares = [Part(number, 7).of(range(100)) for number in range(1, 8)]
    assert sorted(one for share in shares for one in share) == list(range(100))
    assert {len(share) for share in shares} == {14, 15}


def test_few_tasks_are_made_ahead() -> None:
    made: list[int] = []

    def submit(task: int) -> Future[int]:
        made.append(task)
        future: Future[int] = Future()
        future.set_result(task)
        return future

    for number, result in enumerate(parallel._results(submit, range(100), ahead=8)):
        assert result == number
        assert len(made) <= number + 8
    assert len(made) == 100
