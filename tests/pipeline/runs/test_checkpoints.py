"""Checkpoints on disk: complete or absent, the newest intact one is found, and every damage is named."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch

from pipeline.runs.checkpoints import Best, Checkpoint, CheckpointFolder, load_manifest
from pipeline.runs.run import Run
from tests.support.damage import damage
from tests.support.saving import kill_in_saves, state


def write(folder: CheckpointFolder, step: int, best: Best | None = None) -> Checkpoint:
    folder.path.mkdir(exist_ok=True)
    return folder.write(state(step), Checkpoint(step, 0, "", best))


def names(folder: CheckpointFolder) -> list[str]:
    return sorted(path.name for path in folder.path.iterdir())


def test_two_checkpoints_are_kept_beside_the_best_one(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 4), (5, 4), (6, 4), (7, 4)):
        write(folder, step, Best(best, best / 10))
        assert folder.best is not None
        assert torch.load(folder.best, weights_only=True)["global_step"] == best
        assert folder.last is not None
        assert torch.load(folder.last, weights_only=True)["global_step"] == step
        if step == 4:  # step 3 is the older one, for which the best is 1
            assert {name for name in names(folder) if name.endswith("json")} == {f"step-{n}.json" for n in (1, 3, 4)}
    expected = {f"step-{step}.{suffix}" for step in (4, 6, 7) for suffix in ("ckpt", "json")}
    assert set(names(folder)) == expected | {"last.ckpt", "best.ckpt"}


def test_more_checkpoints_are_kept_on_request(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    folder.num_kept = 4
    for step in range(1, 8):
        write(folder, step)
    assert [manifest.name for manifest in folder.manifests()] == [f"step-{step}.json" for step in (7, 6, 5, 4)]


def test_the_newest_intact_checkpoint_is_taken_and_every_damaged_one_is_named(tmp_path: Path) -> None:
    """Flips, cuts and zeros at 50 places, in the file or in its manifest."""
    folder = CheckpointFolder(tmp_path / "checkpoints")
    first, second = write(folder, 1), write(folder, 2)
    assert folder.newest() == (second, [])
    kept = {path.name: path.read_bytes() for path in folder.path.glob("step-*")}
    for number in range(50):
        file = folder.path / ("step-2.ckpt" if number % 2 else "step-2.json")
        done = damage(file, number)
        checkpoint, damaged = folder.newest()
        assert checkpoint == first, (file.name, done)
        assert len(damaged) == 1
        assert "step-2." in damaged[0]
        file.write_bytes(kept[file.name])
    assert folder.newest() == (second, [])


def test_a_second_save_of_a_step_replaces_the_first_one_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    first = write(folder, 3)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "describe", lambda *arguments: 1 / 0)  # a kill before the manifest
        with pytest.raises(ZeroDivisionError):
            write(folder, 3)
    assert folder.newest() == (first, [])
    folder.tidy(first)
    assert set(names(folder)) == {"step-3.ckpt", "step-3.json", "last.ckpt"}
    second = write(folder, 3, Best(3, 0.5))
    assert folder.newest() == (second, [])
    assert set(names(folder)) == {"step-3-again.ckpt", "step-3.json", "last.ckpt", "best.ckpt"}
    third = write(folder, 3, Best(3, 0.5))
    assert third.file == first.file
    assert len(set(names(folder))) == 4


def test_a_best_file_that_somebody_has_removed_keeps_its_other_name(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        newest = write(folder, step, Best(1, 0.5))
    (folder.path / "step-1.ckpt").unlink()
    folder.tidy(newest)
    write(folder, 4, Best(1, 0.5))
    assert folder.best is not None
    assert torch.load(folder.best, weights_only=True)["global_step"] == 1


def test_the_best_checkpoint_is_found_without_its_link(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        write(folder, step, Best(1, 0.5))
    (folder.path / "best.ckpt").unlink()
    assert folder.best == folder.path / "step-1.ckpt"


def test_a_file_that_cannot_be_opened_is_not_taken_for_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    first, _ = write(folder, 1), write(folder, 2)
    real = Path.open

    def failing(number: int) -> None:
        def opening(path: Path, *rest: str, **options: str) -> object:
            if path.name == "step-2.ckpt":
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *rest, **options)  # type: ignore[call-overload]  # passed on as it is

        monkeypatch.setattr(Path, "open", opening)

    failing(errno.EACCES)
    with pytest.raises(PermissionError, match=r"step-2\.ckpt"):
        folder.newest()
    failing(errno.EIO)  # a bad sector
    checkpoint, (damage,) = folder.newest()
    assert checkpoint == first
    assert "step-2.ckpt" in damage


def test_a_manifest_without_its_file_is_named(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    first = write(folder, 1)
    write(folder, 2)
    (folder.path / "step-2.ckpt").unlink()
    checkpoint, damaged = folder.newest()
    assert checkpoint == first
    assert damaged == [f"{folder.path / 'step-2.ckpt'} is missing"]


def test_a_run_without_an_intact_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    run = Run(tmp_path)
    write(run.checkpoints, 1)
    damage(run.checkpoints.path / "step-1.ckpt", 2)
    with pytest.raises(ValueError, match=r"step-1.ckpt is damaged: .*: no checkpoint is left; remove .*checkpoints to"):
        run.newest_checkpoint()


def test_a_checkpoint_of_an_earlier_version_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.checkpoints.path.mkdir()
    torch.save(state(5), run.checkpoints.path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last.ckpt has no manifest: remove .*checkpoints to start the run over"):
        run.newest_checkpoint()


def test_what_a_kill_leaves_is_removed_by_the_next_start(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    newest = write(folder, 1, Best(1, 0.5))
    for name in (".step-2.ckpt", "step-2.ckpt", ".step-2.json", ".last.ckpt"):  # in the order in which they are written
        (folder.path / name).write_bytes(b"cut o")
    (folder.path / "last.ckpt").unlink()
    assert folder.newest() == (newest, [])
    folder.tidy(newest)
    assert names(folder) == ["best.ckpt", "last.ckpt", "step-1.ckpt", "step-1.json"]
    for name in ("last.ckpt", "best.ckpt"):
        assert torch.load(folder.path / name, weights_only=True)["global_step"] == 1


@pytest.mark.parametrize("fails_at", ["write", "fsync", "rename"])
def test_a_full_disk_leaves_the_older_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    first, second = write(folder, 1), write(folder, 2)
    before = names(folder)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = {"write": (torch, "save"), "fsync": (os, "fsync"), "rename": (Path, "replace")}[fails_at]
    with monkeypatch.context() as patch:
        patch.setattr(*target, full)
        with pytest.raises(OSError, match="No space left on device"):
            write(folder, 3)
    assert names(folder) == before
    assert folder.newest() == (second, [])
    assert load_manifest(folder.path / "step-1.json") == first


def test_a_manifest_states_the_size_and_digest_of_its_file(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    write(folder, 3, Best(3, 0.25))
    content = (folder.path / "step-3.ckpt").read_bytes()
    manifest = json.loads((folder.path / "step-3.json").read_text())
    assert manifest["sha256"] == hashlib.sha256(content).hexdigest()
    assert manifest["bytes"] == len(content)
    assert manifest["best"] == {"step": 3, "score": 0.25}


@pytest.mark.faults
@pytest.mark.parametrize("place", ["the same file system", "another file system"])
def test_kills_in_saves_leave_an_intact_checkpoint_and_nothing_else(tmp_path: Path, place: str) -> None:
    if place == "the same file system":
        assert kill_in_saves(tmp_path / "checkpoints", kills=20, seed=0) > 20
        return
    memory = Path("/dev/shm")
    if not memory.is_dir() or os.stat(memory).st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("there is no other file system")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        assert kill_in_saves(Path(folder) / "checkpoints", kills=20, seed=1) > 20
