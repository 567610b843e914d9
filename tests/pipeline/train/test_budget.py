"""A time for the training sets its epochs, once."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import pytest
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from pipeline.build.settings import parse_budget
from pipeline.train import budget, fit
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


def test_a_measurement_changes_nothing(train: Typed, with_digits: Path) -> None:
    """As many epochs as a tenth of a second allows, with everything that is random."""
    runs, words = with_digits / "runs", (*WORDS, "augment=reference", "mix=mixup", "recipe.head_warmup=0.2")
    train(*words, "budget=0.1s", "name=measured")
    epochs, steps = recorded(runs / "measured")
    assert steps == 4 * int(str(epochs)) > 0
    train(*words, f"recipe.epochs={epochs}", "name=given")
    assert differences(results(runs / "given"), results(runs / "measured")) == []
    shutil.rmtree(runs)
