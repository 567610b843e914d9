"""A time for the training sets its epochs, once."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from pipeline.build.settings import parse_budget
from pipeline.train import budget, fit
from pipeline.train.budget import Rehearsal
from pipeline.train.fit import limit_epoch
from pipeline.train.job import Job
from tests.support.commands import Typed
from tests.support.resume import Stop, checkpoint, differences, results, train_until

WORDS = (
    "+model=lenet", "model.dropout=0.3", "data.batch_size=64", "+trainer.limit_train_batches=4",
    "+trainer.limit_val_batches=2", "log_every=2", "tracking=none", "trainer=cpu",
)  # fmt: skip


@pytest.fixture
def epoch_takes(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the coming measurements find."""
    seconds: list[float] = []
    monkeypatch.setattr(budget, "measure_epoch", lambda job, trainer: seconds.pop(0))
    return seconds


class Measurement:
    """In place of the clock: a batch of training takes a second, one of an evaluation 100; counts calls by class."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.answers = [1.0, 100.0]

    def add(self, called: object, *rest: object) -> None:
        """Count a call of a network or an optimizer."""
        self.calls[type(called).__name__] += 1

    def seconds_a_batch(self, step: Callable[[object], None], batches: Iterable[object], **options: object) -> float:
        """Take four batches."""
        hooks = [register_module_forward_hook(self.add), register_optimizer_step_post_hook(self.add)]
        for batch in islice(batches, 4):
            step(batch)
        for hook in hooks:
            hook.remove()
        return self.answers.pop(0)


def recorded(run: Path) -> tuple[object, object]:
    """The epochs in the run's fingerprint, and the steps of its last checkpoint."""
    return json.loads((run / "fingerprint.json").read_text())["recipe.epochs"], checkpoint(run)["global_step"]


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("20m", 1200), ("2.5h", 9000), ("0.5m", 30)])
def test_a_budget_is_a_number_with_a_unit(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["20", "m", "-3m", "0m", "1:30", "20 m", "1d", 20, "1e3s", ""])
def test_another_text_is_no_budget(text: object) -> None:
    with pytest.raises(ValueError, match=f"^budget={text} must be a time, as 90s, 20m or 2.5h$"):
        parse_budget(text)


def test_a_run_keeps_the_epochs_of_its_budget(
    train: Typed, with_digits: Path, epoch_takes: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = with_digits / "runs"
    train(*WORDS, "recipe.epochs=3", "name=given")
    epoch_takes.append(17.0)
    assert train_until(Stop(5), *WORDS, "budget=1m", "name=cut") == 143
    assert epoch_takes == []
    printed = train(*WORDS, "budget=1m", "name=cut")  # which measures nothing
    assert "budget      1m: 3 epochs, as the run began\n" in printed
    assert "(continues after step 5)" in printed
    assert recorded(runs / "cut") == (3, 12)
    assert differences(results(runs / "given"), results(runs / "cut")) == []
    epoch_takes.append(17.0)
    with pytest.raises(ValueError, match="runs/cut was started with budget=1m, not 2m: "):
        train(*WORDS, "budget=2m", "name=cut", "again=continue")
    with pytest.raises(ValueError, match=r"runs/cut was started with recipe.optimizer.lr=null, not 0.1: "):
        train(*WORDS, "budget=1m", "recipe.optimizer.lr=0.1", "name=cut", "again=continue")
    epoch_takes.append(100.0)
    printed = train(*WORDS, "budget=1m", "recipe.optimizer.lr=0.1", "name=cut", "again=replace")
    assert "budget      1m: 1 epochs of 100 s, as measured\n" in printed
    assert recorded(runs / "cut") == (1, 4)


def test_the_default_name_does_not_depend_on_what_was_measured(
    train: Typed, with_digits: Path, epoch_takes: list[float]
) -> None:
    epoch_takes.extend([40.0, 20.0])
    for _ in range(2):
        train(*WORDS, "budget=1m")
    first, second = sorted((with_digits / "runs").iterdir(), key=lambda path: len(path.name))
    assert second.name == f"{first.name}-2", "after a finished run, another one with its own measurement"
    assert (recorded(first), recorded(second)) == ((1, 4), (3, 12))


@pytest.mark.parametrize(
    ("words", "seconds", "calls"),  # of the network and of the optimizer
    [
        ((), 4 + 200, (4 + 4, 4)),
        (("recipe.accumulate=2",), 4 + 200, (4 + 4, 2)),
        (("averaging=ema", "averaging.min_windows=0"), 4 + 200, (4 + 2 * 4, 4)),
        (("++trainer.limit_val_batches=0",), 4, (4, 4)),
        (("++trainer.limit_val_batches=0.5",), 4 + 300, (4 + 4, 4)),  # half of 6
        (("++trainer.limit_train_batches=0.5",), 11 + 200, (4 + 4, 4)),  # half of 22
        (("+trainer.check_val_every_n_epoch=2",), 4 + 100, (4 + 4, 4)),
        (("+trainer.val_check_interval=0.5",), 4 + 400, (4 + 4, 4)),
    ],
)
def test_what_is_measured_is_what_an_epoch_does(
    words: tuple[str, ...], seconds: int, *, calls: tuple[int, int], train: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurement = Measurement()
    monkeypatch.setattr(budget, "_seconds_a_batch", measurement.seconds_a_batch)
    monkeypatch.setattr(fit, "train", lambda *rest, **options: None)
    printed = train(*WORDS, *words, "budget=1s")
    assert f"budget      1s: 1 epochs of {seconds} s, as measured\n" in printed
    assert (measurement.calls["ConvNet"], measurement.calls["SGD"]) == calls


def test_a_measurement_has_complete_optimizer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, clock = {"batch": 1.0, "step": 10.0}, [0.0]
    monkeypatch.setattr(budget.time, "perf_counter", lambda: clock[0])
    for multiple in (1, 5, 12, 20):
        taken: list[int] = []

        def take(number: int, multiple: int = multiple, taken: list[int] = taken) -> None:
            taken.append(number)
            is_step = (number + 1) % multiple == 0
            clock[0] += seconds["batch"] + (seconds["step"] if is_step else 0) + (100 if number < 3 else 0)

        found = budget._seconds_a_batch(take, range(1000), device=torch.device("cpu"), multiple=multiple)
        assert found == pytest.approx(seconds["batch"] + seconds["step"] / multiple)
        assert 15 <= len(taken) <= 40
    clock[0] = 0.0
    assert budget._seconds_a_batch(take, range(20), device=torch.device("cpu"), multiple=20) == 1 + (10 + 300) / 20


def test_a_copy_steps_as_the_training_does(train: Typed, with_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same batches through the measurement's copy and through Lightning give the same weights and averages."""
    words = ("+model=lenet", "data.batch_size=64", "tracking=none", "trainer=cpu", "trainer.precision=32-true")
    tuned = ("recipe.clip_norm=0.1", "recipe.accumulate=2", "averaging=ema", "averaging.min_windows=0")
    flat = ("schedule=constant", "recipe.warmup=0", "+trainer.limit_train_batches=4", "name=one")
    copies: list[Rehearsal] = []

    def measure(job: Job, trainer: pl.Trainer) -> float:
        limit_epoch(trainer, job.data, num_epochs=1)
        job.data.trainer = trainer
        job.data.choose_decoder(torch.device("cpu"), before=None, probes=True)
        job.module.images_per_step = job.data.images_per_step(trainer.world_size)
        copies.append(Rehearsal(job, trainer))
        for batch in islice(job.data.train_dataloader(), 4):
            copies[0].train(batch)
        job.data.limit_batches = None
        return 1.0

    monkeypatch.setattr(budget, "measure_epoch", measure)
    train(*words, *tuned, *flat, "budget=1s")
    saved = checkpoint(with_digits / "runs" / "one")
    module = copies[0].module
    assert module.average is not None
    for name, tensor in module.net.state_dict().items():
        torch.testing.assert_close(tensor, saved["state_dict"][f"net.{name}"], rtol=0, atol=1e-7)
        torch.testing.assert_close(module.average.tensors[name], saved["averages"][name], rtol=0, atol=1e-7)


def test_a_measurement_changes_nothing(train: Typed, with_digits: Path) -> None:
    """As many epochs as a tenth of a second allows, with everything that is random."""
    runs, words = with_digits / "runs", (*WORDS, "augment=reference", "mix=mixup", "recipe.head_warmup=0.2")
    train(*words, "budget=0.1s", "name=measured")
    epochs, steps = recorded(runs / "measured")
    assert steps == 4 * int(str(epochs)) > 0
    train(*words, f"recipe.epochs={epochs}", "name=given")
    assert differences(results(runs / "given"), results(runs / "measured")) == []
    shutil.rmtree(runs)
