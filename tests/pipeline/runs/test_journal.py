"""The journal against what may happen to a file: kills, flipped bytes, repeated lines, a full disk."""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import shlex
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.runs.journal import Journal


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """Facts at step 0, and then a point and an evaluation at each of three steps."""
    journal = Journal(tmp_path / "a folder" / "metrics.jsonl")
    journal.path.parent.mkdir()
    journal.record({"params_millions": 1.5}, 0)
    for step in (10, 20, 30):
        journal.record({"train/loss": 1 / step, "train/lr": 0.1}, step)
        journal.record({"val/top1": step / 100}, step)
    return journal


@contextmanager
def limited_file_size(size: int) -> Iterator[None]:
    """Let the kernel refuse what goes beyond a size, as a full disk does: first a part is written, then nothing."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_every_line_is_json_that_ends_with_the_crc_of_the_rest(journal: Journal) -> None:
    lines = journal.path.read_text().splitlines()
    assert len(lines) == 7
    for line in lines:
        fields = json.loads(line, parse_constant=pytest.fail)
        assert next(iter(fields)) == "step"
        assert list(fields)[-1] == "crc"
        assert int(fields["crc"], 16) == zlib.crc32(line.rpartition(', "crc"')[0].encode())
    points = list(journal.points())
    assert [point.step for point in points] == [0, 10, 10, 20, 20, 30, 30]
    assert points[1].values == {"train/loss": 0.1, "train/lr": 0.1}
    assert points[-1].end == journal.path.stat().st_size
    assert [point.line for point in journal.points(line=points[4].line, end=points[4].end)] == [6, 7]


def test_numbers_that_are_none_become_null(journal: Journal) -> None:
    journal.record({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 2}, 40)
    last = json.loads(journal.path.read_text().splitlines()[-1], parse_constant=pytest.fail)
    assert (last["a"], last["b"], last["c"], last["d"]) == (None, None, None, 2.0)
    *_, point = journal.points()
    assert point.values.keys() == {"a", "b", "c", "d"}
    assert math.isnan(point.values["a"])
    assert journal.values_at(40) == {"d": 2.0}
    assert journal.values_at(20) == {"train/loss": 0.05, "train/lr": 0.1, "val/top1": 0.2}
    assert journal.values_at(25) == {}


def test_every_flipped_bit_is_found(journal: Journal) -> None:
    content, found = journal.path.read_bytes(), 0
    third = content.index(b"\n", content.index(b"\n") + 1) + 1
    for position in range(third, content.index(b"\n", third)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        journal.path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"metrics.jsonl, line 3 is damaged"):
            list(journal.points())
        found += 1
    assert found > 50


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 1, 1, 2], "line 3 repeats values of step 10"),
        ([0, 1, 2, 1, 2], "line 4 repeats values of step 10"),
        ([0, 3, 1], "line 3 has step 10 after step 20"),
    ],
)
def test_lines_that_are_repeated_or_misplaced_are_found(journal: Journal, order: list[int], message: str) -> None:
    lines = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(b"".join(lines[number] for number in order))
    with pytest.raises(ValueError, match=message):
        journal.truncate_after(100)


@pytest.mark.parametrize("text", [b"garbage\n", b"\n", b'{"step": 5}\n', b"\xff\xfe\x00\n"])
def test_the_command_in_the_message_repairs_the_file(journal: Journal, text: bytes) -> None:
    lines = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(b"".join([*lines[:3], text, *lines[3:]]))
    with pytest.raises(ValueError, match="line 4 is damaged") as error:
        journal.truncate_after(30)
    command = str(error.value).partition(": sed")[2].removesuffix(" removes it and all after it")
    subprocess.run(shlex.split(f"sed{command}"), check=True)
    assert journal.path.read_bytes() == b"".join(lines[:3])


def test_damage_after_the_checkpoint_is_cut_away(journal: Journal) -> None:
    with journal.path.open("a") as file:
        file.write("garbage\n")
    journal.truncate_after(20)
    assert [point.step for point in journal.points()] == [0, 10, 10, 20, 20]
    journal.truncate_after(-1)
    assert journal.path.read_bytes() == b""
    journal.truncate_after(5)
    Journal(journal.path.with_name("missing")).truncate_after(5)


def test_a_kill_at_any_byte_loses_the_last_line_only(journal: Journal) -> None:
    content = journal.path.read_bytes()
    begin = content.rindex(b"\n", 0, -1) + 1
    for length in range(begin, len(content)):
        journal.path.write_bytes(content[:length])
        assert [point.step for point in journal.points()] == [0, 10, 10, 20, 20, 30]
        assert journal.digest()[0] <= begin
    journal.truncate_after(30)
    assert journal.path.read_bytes() == content[:begin]


def test_the_digest_is_that_of_the_complete_lines(journal: Journal) -> None:
    def expected() -> tuple[int, str]:
        complete = journal.path.read_bytes().rpartition(b"\n")[0] + b"\n"
        return len(complete), hashlib.sha256(complete).hexdigest()

    assert journal.digest() == expected()
    journal.record({"train/loss": 0.5}, 40)
    assert journal.digest() == expected() == Journal(journal.path).digest()
    with journal.path.open("a") as file:
        file.write('{"step": 50, "tr')
    assert journal.digest() == expected()
    journal.truncate_after(20)
    assert journal.digest() == expected()
    journal.record({"train/loss": 0.25}, 30)
    assert journal.digest() == expected()
    assert Journal(journal.path.with_name("missing")).digest() == (0, hashlib.sha256().hexdigest())


def test_a_full_disk_leaves_a_journal_that_reads_well(journal: Journal) -> None:
    content = journal.path.read_bytes()
    for space in (0, 1, 20):
        with limited_file_size(len(content) + space), pytest.raises(OSError, match=r"metrics\.jsonl|File too large"):
            journal.record({"train/loss": 0.5}, 40)
        assert journal.path.read_bytes() == content
    journal.record({"train/loss": 0.5}, 40)
    assert [point.step for point in journal.points()][-2:] == [30, 40]


def test_a_line_is_one_write_and_no_file_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, written, write = Journal(tmp_path / "metrics.jsonl"), [], os.write
    monkeypatch.setattr(os, "write", lambda file, data: written.append(bytes(data)) or write(file, data))
    before = len(os.listdir("/proc/self/fd"))
    for step in range(1000):
        journal.record({"train/loss": 1.0}, step)
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(written) == 1000
    assert b"".join(written) == journal.path.read_bytes()
