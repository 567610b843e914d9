"""The faults of test_faults.py, an hour of them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import pytorch_lightning as pl

from data.shards.dataset import Dataset
from data.shards.indexing import open_dataset
from pipeline.runs.run import Run
from pipeline.train import fit
from tests.support.commands import TWO_RANKS
from tests.support.damage import damage
from tests.support.processes import Training, interruptible, train_undisturbed
from tests.support.resume import TWELVE_STEPS, differences, results, train_until
from tests.support.saving import kill_in_saves

pytestmark = pytest.mark.soak
RANKS = (
    "+model=lenet", "model.dropout=0.3", "recipe.optimizer.lr=0.01", "trainer.precision=32-true", "augment=reference",
    "policy=randaugment", "erasing=pixel", "mix=mixup_cutmix", "averaging=ema", "recipe.head_warmup=0.1",
    "data.batch_size=8", "recipe.epochs=60", "+trainer.limit_val_batches=2", "log_every=7", "tracking=none",
    "checkpoint.every_steps=9", *TWO_RANKS,
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> Path:
    """A folder with the digits, and the undisturbed run of two ranks."""
    return train_undisturbed(tmp_path_factory.mktemp("soak"), digits, RANKS)


def disturb(root: Path, name: str, *, seed: int, times: int, by: Callable[[Training, random.Random], None]) -> None:
    """Disturb a training so many times at random moments, from the start of the process on; then let it end."""
    draw = random.Random(seed)
    for _ in range(times):
        training = Training(root, name, *RANKS)
        with pytest.raises(subprocess.TimeoutExpired):  # else it has ended before
            training.process.wait(draw.uniform(0.5, 10))
        by(training, draw)
        training.end()
    ended = Training(root, name, *RANKS).end()
    assert ended.code == 0, ended


@pytest.mark.parametrize("seed", range(10))
def test_chains_of_ten_kills_end_in_the_same_bits(root: Path, seed: int) -> None:
    disturb(root, f"killed{seed}", seed=seed, times=10, by=lambda training, draw: training.kill())
    assert differences(results(root / "runs" / "complete"), results(root / "runs" / f"killed{seed}")) == []


@pytest.mark.parametrize("seed", range(6))
def test_chains_of_five_signals_end_in_the_same_bits(root: Path, seed: int) -> None:
    def send(training: Training, draw: random.Random) -> None:
        number = draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
        training.signal_group(number) if draw.random() < 0.5 else training.process.send_signal(number)
        code = training.process.wait(60)
        assert code == (130 if number == signal.SIGINT else 143), (number, code, training.stderr_file.read_text())

    with interruptible():
        disturb(root, f"stopped{seed}", seed=100 + seed, times=5, by=send)
    assert differences(results(root / "runs" / "complete"), results(root / "runs" / f"stopped{seed}")) == []


def test_300_kills_in_saves_leave_an_intact_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    print(kill_in_saves(tmp_path / "checkpoints", kills=300, seed=2), "checkpoints were written")


def test_1000_damages_of_checkpoint_index_manifest_and_journal_are_found(
    with_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(with_digits)
    assert train_until(None, *TWELVE_STEPS, "name=mine") == 0
    run, data = Run(with_digits / "runs" / "mine"), with_digits / "datasets" / "digits"
    newest = run.newest_checkpoint().checkpoint
    assert newest is not None

    def is_found(file: Path) -> bool:
        if file.parent == data:
            with pytest.raises(ValueError, match=file.name):
                open_dataset(data)
            return True
        if file == run.journal.path:
            try:
                list(run.journal.points())
            except ValueError as error:
                return "line" in str(error)
            fresh = Run(run.folder).journal  # cut between two lines, or in the last one
            return fresh.digest() != (newest.journal_bytes, newest.journal)
        return any(file.name in sentence for sentence in run.checkpoints.newest().damaged)

    names = [run.checkpoints.path / newest.file, run.checkpoints.path / f"step-{newest.step}.json"]
    files = [*names, run.journal.path, data / "dataset.json", data / "train.parquet", data / "val.parquet"]
    for number in range(1000):
        file = files[number % len(files)]
        content = file.read_bytes()
        done = damage(file, number)
        assert is_found(file), (file.name, done)
        file.write_bytes(content)
    assert run.newest_checkpoint() == (newest, [])
    open_dataset(data)


EARLY, LATE = range(300, 310), range(990, 1000)  # epochs


def test_1000_short_epochs_need_no_more_memory_and_no_more_files(
    with_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Look(pl.Callback):
        """Memory and open files at the start of some epochs, where a thread may still write a checkpoint."""

        def __init__(self) -> None:
            self.seen: dict[int, tuple[float, int]] = {}

        def on_train_epoch_start(self, trainer: pl.Trainer, *rest: object) -> None:
            process = psutil.Process()
            if trainer.current_epoch in (*EARLY, *LATE):
                self.seen[trainer.current_epoch] = process.memory_info().rss / 2**20, process.num_fds()

    monkeypatch.chdir(with_digits)
    own, look = fit.own_callbacks, Look()
    words = [word for word in TWELVE_STEPS if not word.startswith(("+trainer", "recipe.epochs", "stop_early"))]
    with monkeypatch.context() as patch:
        patch.setattr(fit, "own_callbacks", lambda job: [look, *own(job)])
        limits = ("+trainer.limit_train_batches=2", "+trainer.limit_val_batches=1", "recipe.epochs=1000")
        assert train_until(None, *words, *limits, "name=mine") == 0
    assert look.seen.keys() == {*EARLY, *LATE}
    before, after = look.seen[EARLY[0]][0], look.seen[LATE[-1]][0]
    files_before, files_after = (min(look.seen[epoch][1] for epoch in epochs) for epochs in (EARLY, LATE))
    print(f"{before:.0f} MiB and {files_before} files after 300 epochs, {after:.0f} MiB and {files_after} after 999")
    assert files_after <= files_before
    assert after < before + 30
    assert len(os.listdir(with_digits / "runs" / "mine" / "checkpoints")) <= 10
