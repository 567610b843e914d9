"""A training whose folder has a run already: `again=continue`, `replace` or `refuse`, and `out=FOLDER`."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from pipeline.runs.restore import RestoredRun
from pipeline.runs.run import Run
from tests.support.commands import TINY, TWO_RANKS, Typed, run_module
from tests.support.resume import differences, results

WORDS = ("+model=lenet", *TINY, "tracking=none", "out=place")


@pytest.fixture
def trained(train: Typed, with_digits: Path) -> Run:
    """A finished run in the folder `place`, which was there and empty, as an engine makes it."""
    (with_digits / "place").mkdir()
    train(*WORDS)
    return Run(with_digits / "place")


def test_a_result_names_the_bytes_of_its_checkpoint(trained: Run) -> None:
    result = trained.result()
    assert result["val/top1"] > 0.1
    assert result["checkpoint_sha256"] == hashlib.sha256(Path(result["checkpoint"]).read_bytes()).hexdigest()
    assert not (trained.folder.parent / "runs").exists()


@pytest.mark.parametrize("words", [(), ("again=continue",), ("again=replace",), ("again=replace", "log_every=1")])
def test_a_finished_run_of_the_same_settings_is_not_trained_again(
    train: Typed, trained: Run, words: tuple[str, ...]
) -> None:
    before, changed = results(trained.folder), trained.checkpoints.best
    assert changed is not None
    stamps = changed.stat().st_mtime_ns, trained.result_file.stat().st_mtime_ns
    printed = train(*WORDS, *words)
    assert "step " not in printed
    assert f"best val/top1  {before['result']['val/top1']:.4f} on 359 images of split val" in printed
    assert results(trained.folder)["result"] == before["result"]
    assert changed.stat().st_mtime_ns == stamps[0]
    assert trained.result_file.stat().st_mtime_ns > stamps[1], "an engine must find it newer than its inputs"


def test_a_run_of_other_settings_is_moved_aside_only_by_replace(train: Typed, trained: Run) -> None:
    before = results(trained.folder)
    for words in (("seed=1",), ("seed=1", "again=continue")):
        with pytest.raises(ValueError, match="place was started with seed=0, not 1"):
            train(*WORDS, *words)
    assert "moved the run of other settings to place-replaced-1\n" in train(*WORDS, "seed=1", "again=replace")
    train(*WORDS, "seed=2", "again=replace")
    runs = [Run(trained.folder.with_name(name)) for name in ("place-replaced-1", "place-replaced-2", "place")]
    assert [run.fingerprint()["seed"] for run in runs] == [0, 1, 2]
    assert differences(results(runs[0].folder), before) == []
    assert all(run.is_finished for run in runs)


def test_a_run_without_a_fingerprint_is_moved_aside_by_replace(train: Typed, trained: Run) -> None:
    trained.fingerprint_file.unlink()
    with pytest.raises(ValueError, match=r"fingerprint\.json is missing, .* or again=replace$"):
        train(*WORDS)
    assert "moved the run of other settings to place-replaced-1\n" in train(*WORDS, "again=replace")


def test_a_folder_of_other_files_becomes_no_run(train: Typed, trained: Run) -> None:
    with pytest.raises(FileExistsError, match=r"^\. has files, but none of a run: empty it, or add name=NAME"):
        train(*WORDS[:-1], "out=.")
    train(*WORDS[:-1], "out=größe, 2", "again=replace")
    assert Run(trained.folder.with_name("größe, 2")).is_finished


def test_a_finished_run_without_checkpoints_says_so(train: Typed, trained: Run) -> None:
    shutil.rmtree(trained.checkpoints.path)
    with pytest.raises(FileNotFoundError, match=r"place has finished, and its checkpoints are gone: remove .*result\."):
        _ = RestoredRun(trained.folder).weights_file
    trained.result_file.unlink()
    assert "epoch 2/2" in train(*WORDS)


def test_a_replaced_run_starts_with_the_weights_that_are_named(train: Typed, trained: Run) -> None:
    source = trained.folder.with_name("source")
    train(*WORDS, "seed=3", f"out={source.name}")
    words = ("seed=4", f"weights={source.name}/checkpoints/best.ckpt")
    fresh = train(*WORDS, *words, "out=fresh")
    replaced = train(*WORDS, *words, "again=replace")
    assert "10 tensors loaded" in fresh
    assert "10 tensors loaded" in replaced
    assert differences(results(trained.folder.with_name("fresh")), results(trained.folder)) == []
    moved = sorted(path.name for path in trained.folder.parent.glob("place-*"))
    with pytest.raises(FileNotFoundError, match=r"weights=none\.pth"):
        train(*WORDS, "weights=none.pth", "again=replace")
    assert sorted(path.name for path in trained.folder.parent.glob("place-*")) == moved


def test_an_unfinished_run_continues_or_is_moved_with_its_settings(train: Typed, trained: Run) -> None:
    before = results(trained.folder)
    trained.result_file.unlink()
    assert "place (continues after step 10)" in train(*WORDS, "again=replace")
    assert results(trained.folder)["result"] == before["result"]
    trained.result_file.unlink()
    assert "moved the run of other settings to place-replaced-1\n" in train(*WORDS, "seed=1", "again=replace")
    assert not Run(trained.folder.with_name("place-replaced-1")).is_finished


@pytest.mark.faults
def test_two_ranks_replace_a_run(trained: Run) -> None:
    words = (*WORDS, *TWO_RANKS, "data.batch_size=128", "seed=1", "again=replace")
    launch = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pipeline.train")
    answer = run_module(trained.folder.parent, *launch, *words)
    assert answer.returncode == 0, answer.stderr
    assert trained.fingerprint()["seed"] == 1
    assert Run(trained.folder.with_name("place-replaced-1")).fingerprint()["seed"] == 0
    again = run_module(trained.folder.parent, *launch, *words)
    assert (again.returncode, "step " in again.stdout) == (0, False), again.stderr


@pytest.mark.faults
def test_two_ranks_train_in_a_new_folder_with_refuse(with_digits: Path) -> None:
    words = (*WORDS, *TWO_RANKS, "data.batch_size=128", "again=refuse")
    answer = run_module(with_digits, "pipeline.train", *words)  # the second rank starts when the first has begun
    assert answer.returncode == 0, answer.stderr
    assert Run(with_digits / "place").is_finished


def test_refuse_leaves_every_run_as_it_is(train: Typed, trained: Run) -> None:
    before = {path: path.read_bytes() for path in trained.folder.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="place has a run already, and again=refuse"):
        train(*WORDS, "again=refuse")
    assert before == {path: path.read_bytes() for path in trained.folder.rglob("*") if path.is_file()}
    trained.result_file.write_text("{")
    with pytest.raises(ValueError, match=r"result.json is damaged \(.*\): remove it to finish the run again"):
        train(*WORDS, "again=continue")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("again=never",), "again=never is not one of continue, replace, refuse"),
        (("name=mine",), "out=place names the run's folder too: leave name out"),
    ],
)
def test_a_contradiction_is_refused(train: Typed, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(*WORDS, *words)
