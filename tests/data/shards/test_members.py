"""Complete tars of every writer are read; cut, zero-filled and joined ones are not taken for complete."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.loading.inputs import find_images
from data.shards import images
from data.shards.tars import ShardRows, TarTask, read_shard
from tests.support.images import make_jpeg
from tests.support.shards import make_samples, write_tar

PYTHON = [("python", tar_format, 20) for tar_format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
GNU = [("gnu", tar_format, blocks) for tar_format in ("ustar", "gnu", "posix") for blocks in (1, 20, 2048)]
WRITERS = [*PYTHON, *GNU]
Writer = tuple[str, int | str, int]

pytestmark = pytest.mark.skipif(
    "GNU tar" not in subprocess.run(["tar", "--version"], capture_output=True, text=True, check=False).stdout,
    reason="needs GNU tar, the writer of most tars",
)


def write(path: Path, files: dict[str, bytes], writer: Writer) -> Path:
    """Write a tar with Python or the program `tar`, in a format and with a blocking factor."""
    program, tar_format, blocks = writer
    if program == "python":
        return write_tar(path, files, format=tar_format)
    folder = path.with_suffix(".files")
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    options = [f"--format={tar_format}", f"--blocking-factor={blocks}", "--mtime=@0", "--directory", str(folder)]
    subprocess.run(["tar", "--create", f"--file={path}", *options, *files], check=True)
    shutil.rmtree(folder)
    return path


def read(path: Path) -> ShardRows:
    return read_shard(path.parent, TarTask(path.name, 0), label_field="label", size_of=images.intact_size)


def keys(path: Path) -> list[str]:
    shard = read(path)
    assert shard.skipped == []
    return [row.key for row in shard.rows]


def members(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return tar.getmembers()


@pytest.mark.parametrize("writer", WRITERS, ids=str)
@pytest.mark.parametrize("count", [1, 7, 40])
def test_complete_tars_are_read(tmp_path: Path, writer: Writer, count: int) -> None:
    tar = write(tmp_path / "a.tar", make_samples(count), writer)
    assert tar.stat().st_size % (512 * writer[2]) == 0
    assert keys(tar) == [f"{number:05d}" for number in range(count)]


@pytest.mark.parametrize("writer", WRITERS, ids=str)
def test_a_tar_that_was_allocated_but_not_filled_is_not_complete(tmp_path: Path, writer: Writer) -> None:
    tar = write(tmp_path / "a.tar", make_samples(20), writer)
    content, listed = tar.read_bytes(), members(tar)
    ends = [member.offset_data + member.size for member in listed]
    grid, edges = range(0, ends[-1], ends[-1] // 50), ends[-24:]
    cuts = sorted({*grid, *edges, *(end - 1 for end in edges), *(end - 40 for end in edges)})
    complete = {member.name: member for member in listed}
    refusals = []
    for cut in cuts:
        tar.write_bytes(content[:cut] + bytes(len(content) - cut))
        try:
            rows = read(tar).rows
        except ValueError as error:
            refusals.append(str(error))
            continue
        # Only a cut that tar could have written: at most two records before the end, and behind an intact file.
        assert len(content) - cut < 2 * 512 * writer[2] + 2 * 512
        found = members(tar)
        assert not content[found[-1].offset_data + found[-1].size : cut].strip(b"\0")
        for row in rows:
            image = complete[f"{row.key}.jpg"]
            assert (row.offset, row.size) == (image.offset_data, image.size)
    refused = re.compile(r".*a\.tar is damaged or cut short \(.*\): copy or pack it again")
    assert all(map(refused.fullmatch, refusals))
    assert len(refusals) > 75


@pytest.mark.parametrize("writer", WRITERS, ids=str)
@pytest.mark.parametrize("zeros", [3 * 10_240, 3 * 2**20 + 512])
def test_zeros_after_the_end_are_named_and_can_be_removed(tmp_path: Path, writer: Writer, zeros: int) -> None:
    tar = write(tmp_path / "a.tar", make_samples(5), writer)
    if writer[2] == 2048:
        zeros += 2**21
    with tar.open("ab") as stream:
        stream.write(bytes(zeros))
    with pytest.raises(ValueError, match=r"a\.tar is damaged or cut short \([0-9,]+ bytes of zeros follow") as caught:
        read(tar)
    command = re.search(r"if no file is missing, (truncate --size=\d+) removes them", str(caught.value))
    assert command is not None
    subprocess.run([*command[1].split(), str(tar)], check=True)
    assert len(keys(tar)) == 5


def join(first: Path, second: Path, joined: Path) -> Path:
    """Join two tars as `cat` does."""
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    return joined


@pytest.mark.parametrize("first", WRITERS, ids=str)
@pytest.mark.parametrize("second", [WRITERS[2], WRITERS[3]], ids=str)
def test_tars_joined_by_cat_are_named(tmp_path: Path, first: Writer, second: Writer) -> None:
    one = write(tmp_path / "one.tar", make_samples(3), first)
    other = write(tmp_path / "other.tar", make_samples(2, prefix="b"), second)
    joined = join(one, other, tmp_path / "joined.tar")
    advice = r"give both files, or append one at a time with tar --concatenate$"
    with pytest.raises(
        ValueError, match=rf"joined\.tar: another tar begins at byte {one.stat().st_size}, .*: {advice}"
    ):
        read(joined)
    assert len(keys(one)) + len(keys(other)) == 5


@pytest.mark.parametrize("first", WRITERS, ids=str)
@pytest.mark.parametrize("second", WRITERS, ids=str)
def test_tars_joined_by_tar_are_complete(tmp_path: Path, first: Writer, second: Writer) -> None:
    one = write(tmp_path / "one.tar", make_samples(3), first)
    other = write(tmp_path / "other.tar", make_samples(2, prefix="b"), second)
    blocks = max(first[2], second[2])
    subprocess.run(["tar", f"--blocking-factor={blocks}", "--concatenate", f"--file={one}", str(other)], check=True)
    assert len(keys(one)) == 5


def test_no_sample_of_tars_joined_at_once_is_lost_in_silence(tmp_path: Path) -> None:
    tars = [write(tmp_path / f"{name}.tar", make_samples(2, prefix=name), GNU[4]) for name in "abc"]
    subprocess.run(["tar", "--concatenate", f"--file={tars[0]}", *map(str, tars[1:])], check=True)
    with tarfile.open(tars[0], ignore_zeros=True) as tar:
        assert len(tar.getnames()) == 12
    if len(members(tars[0])) < 12:  # GNU tar 1.34 leaves the third behind the end
        with pytest.raises(ValueError, match=r"a\.tar: another tar begins at byte"):
            read(tars[0])
    else:
        assert len(keys(tars[0])) == 6


def test_other_bytes_after_the_end_are_named(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", make_samples(2))
    size = tar.stat().st_size
    with tar.open("ab") as stream:
        stream.write(b"something else")
    with pytest.raises(
        ValueError, match=rf"a\.tar is damaged .*bytes that are no tar follow its end, from byte {size} "
    ):
        read(tar)


@pytest.mark.parametrize("member", ["jpg", "cls"])
def test_zeros_inside_the_last_file_are_a_cut(tmp_path: Path, member: str) -> None:
    files = make_samples(3)
    order = sorted(files, key=lambda name: name.endswith(member))
    tar = write_tar(tmp_path / "a.tar", {name: files[name] for name in order})
    content, last = tar.read_bytes(), members(tar)[-1]
    end = last.offset_data + last.size
    for cut in (last.offset_data, last.offset_data + last.size // 2, end - 1):
        tar.write_bytes(content[:cut] + bytes(len(content) - cut))
        with pytest.raises(ValueError, match=r"cut short \(its last file, of 00002, ends in zeros: .*\): copy or pack"):
            read(tar)


def test_zeros_inside_another_file_skip_its_sample(tmp_path: Path) -> None:
    files = make_samples(3)
    files["00001.jpg"] = files["00001.jpg"][:-300] + bytes(300)
    shard = read(write_tar(tmp_path / "a.tar", files))
    assert [row.key for row in shard.rows] == ["00000", "00002"]
    assert [(Path(one.name).name, one.reason) for one in shard.skipped] == [
        ("a.tar: 00001", "zeros have replaced its end")
    ]


def test_padding_after_a_complete_image_is_not_a_cut(tmp_path: Path) -> None:
    files = make_samples(3)
    files = dict(sorted(files.items(), key=lambda item: item[0].endswith("jpg")))
    files["00002.jpg"] += bytes(700)
    assert len(keys(write_tar(tmp_path / "a.tar", files))) == 3


def encode(image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(make_jpeg(60, 90))).save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "encoded",
    [make_jpeg(60, 90), encode("JPEG", progressive=True), encode("PNG"), encode("WEBP"), encode("WEBP", lossless=True)],
    ids=["jpeg", "progressive", "png", "webp", "lossless"],
)
def test_images_whose_end_is_zeros_are_not_intact(encoded: bytes) -> None:
    images.check_intact(encoded)
    cuts = np.linspace(0, len(encoded) - 40, 100).astype(int).tolist()
    for cut in cuts:
        with pytest.raises(images.UnreadableImage):
            images.check_intact(encoded[:cut] + bytes(len(encoded) - cut))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content + content, "^another tar begins at byte 10240, .*give both files"),
        (lambda content: content + bytes(30_720), r"^the tar is damaged, or compressed: [\d,]+ bytes of zeros follow"),
    ],
)
def test_predict_names_tars_that_are_not_complete(
    tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    tar = write_tar(tmp_path / "a.tar", make_samples(2))
    assert len(list(find_images(str(tar), lines=()))) == 2
    tar.write_bytes(damage(tar.read_bytes()))
    found = list(find_images(str(tar), lines=()))
    assert [source.name for source in found] == [f"{tar}/00000.jpg", f"{tar}/00001.jpg", str(tar)]
    with pytest.raises(ValueError, match=message):
        found[-1].read()
