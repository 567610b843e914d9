"""A training of twelve steps, stopped after any of them: it continues to the same bits, also from there once more."""

from __future__ import annotations

import shutil
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from tests.support.resume import EVALUATIONS, POINTS, TWELVE_STEPS, Stop, checkpoint, differences, results, train_until


def train_in_parts(root: Path, *stops: Stop, words: tuple[str, ...] = TWELVE_STEPS) -> Path:
    """Train the run `cut` with these stops, to its end."""
    shutil.rmtree(root / "runs" / "cut", ignore_errors=True)
    for stop in stops:
        assert train_until(stop, *words, "name=cut") == 143
        assert checkpoint(root / "runs" / "cut")["global_step"] == stop.step
    assert train_until(None, *words, "name=cut") == 0
    return root / "runs" / "cut"


@pytest.fixture
def complete(with_digits: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The undisturbed run."""
    monkeypatch.chdir(with_digits)
    assert train_until(None, *TWELVE_STEPS, "name=complete") == 0
    return with_digits / "runs" / "complete"


@pytest.mark.parametrize("stops", [(Stop(3), Stop(5)), (Stop(4), EVALUATIONS[0]), (Stop(12), EVALUATIONS[2])], ids=str)
def test_a_training_in_parts_ends_in_the_same_bits(complete: Path, with_digits: Path, stops: tuple[Stop, ...]) -> None:
    expected = results(complete)
    assert len(expected["journal"]) == 4 + 3
    assert differences(expected, results(train_in_parts(with_digits, *stops))) == []


@pytest.mark.parametrize(
    "changes",
    [
        ("optimizer=lamb",),
        ("optimizer=muon",),
        ("optimizer=schedule_free",),
        ("recipe.layer_decay=0.5", "recipe.head_warmup=0.5", "recipe.freeze=[stem,stage1]"),
    ],
    ids=" ".join,
)
def test_a_training_with_other_groups_or_optimizers_continues_to_the_same_bits(
    with_digits: Path, monkeypatch: pytest.MonkeyPatch, changes: tuple[str, ...]
) -> None:
    monkeypatch.chdir(with_digits)
    words = (*TWELVE_STEPS, *changes)
    assert train_until(None, *words, "name=complete") == 0
    expected = results(with_digits / "runs" / "complete")
    assert len(expected["last"]["optimizer_states"][0]["state"]) >= 6, "a state for each tensor that trains"
    assert differences(expected, results(train_in_parts(with_digits, Stop(5), words=words))) == []


@pytest.mark.faults
@pytest.mark.parametrize(
    "pairs",
    [
        pytest.param([*pairwise(POINTS), *((stop, stop) for stop in EVALUATIONS)], id="neighbours"),
        pytest.param(list(combinations(POINTS, 2)), id="all", marks=pytest.mark.soak),
    ],
)
def test_pairs_of_resume_points_end_in_the_same_bits(
    complete: Path, with_digits: Path, pairs: list[tuple[Stop, Stop]]
) -> None:
    expected = results(complete)
    assert len(pairs) in (11 + 3, 66)
    for pair in pairs:
        assert differences(expected, results(train_in_parts(with_digits, *pair))) == [], pair


def test_an_evaluation_that_is_done_again_is_recorded_once(complete: Path, with_digits: Path) -> None:
    """Killed between an evaluation and the save after it, with a checkpoint of the step before the evaluation."""
    assert train_until(Stop(8, in_evaluation=True), *TWELVE_STEPS, "name=cut") == 143
    run = with_digits / "runs" / "cut"
    evaluated = next(line for line in (complete / "metrics.jsonl").read_text().splitlines(keepends=True)
                     if '"step": 8' in line and "val/top1" in line)  # fmt: skip
    with (run / "metrics.jsonl").open("a") as journal:
        journal.write(evaluated)
    assert train_until(None, *TWELVE_STEPS, "name=cut") == 0
    assert differences(results(complete), results(run)) == []
