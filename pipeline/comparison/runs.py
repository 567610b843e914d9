"""What a trained run has reached and what it cost, from the files in its folder."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data.augment.crops import describe_size, height_and_width
from models.analysis.summary import summarize
from models.learning.evaluation import top1_of
from pipeline.build.network import build_without_values
from pipeline.evaluate.calibration import mcnemar_p
from pipeline.runs.restore import RestoredRun
from pipeline.runs.run import Run

EVALUATION, PREDICTIONS = "evaluation.json", "predictions.parquet"
SPLITS = ("test", "val")  # in the order in which runs are compared
# A longer interval between two points is a pause, not an evaluation: this many seconds, and this many medians.
PAUSE_SECONDS, PAUSE_MEDIANS = 600, 10
RATE = "train/images_per_second"

Answers = dict[tuple[str, str], bool]  # whether an image was classified right, by shard and key


@dataclass(frozen=True)
class ComparedRun:
    """A run: what it has reached, on which images, and what its network and its training cost.

    `training_images` and `top1_images` are digests of their rows in the index. `interval` covers 95 %; it and `answers`
    are empty for a run that was not evaluated. `receptive_field` is in pixels, None where it is global from the start
    or unknown. `hours` are those between points of the journal, without pauses.
    """

    name: str
    folder: str
    network: str
    dataset: str
    training_images: str
    top1_images: str
    image_size: str
    top1: float | None
    interval: tuple[float, float] | None
    images: int | None
    parameters: int
    gmacs: float
    receptive_field: float | None
    images_per_second: float | None
    epochs: int
    hours: float
    answers: Answers

    def to_dict(self) -> dict[str, Any]:
        """Return the row of a table, without the answers."""
        low, high = self.interval or (None, None)
        fields = {name: value for name, value in vars(self).items() if name not in ("answers", "interval")}
        return fields | {"top1_low": low, "top1_high": high}


@dataclass(frozen=True)
class Neighbours:
    """Two runs that follow each other by top-1, on the same images (McNemar 1947)."""

    better: str
    worse: str
    right_better_alone: int
    right_worse_alone: int
    mcnemar_p: float


def choose_split(runs: Sequence[RestoredRun], wanted: str | None) -> str | None:
    """Return the split on which all runs were evaluated with their best weights, None without one.

    Raises: ValueError, naming a run that was not evaluated on the split `wanted`.
    """
    found = [set(_evaluations(run)) for run in runs]
    if wanted is None:
        return next((split for split in SPLITS if all(split in splits for splits in found)), None)
    for run, splits in zip(runs, found, strict=True):
        if wanted not in splits:
            advice = f"python -m pipeline.evaluate run={run.run.folder} split={wanted}"
            raise ValueError(f"split={wanted}: {run.run.folder} has no evaluation on it: {advice}")
    return wanted


def read_run(restored: RestoredRun, *, split: str | None) -> ComparedRun:
    """Read one run; without a split, its top-1 is that of the evaluation that chose its weights.

    Raises: ValueError for a run that has not finished, or whose files are damaged.
    """
    run, size = restored.run, height_and_width(restored.image_size)
    if not run.is_finished:
        raise ValueError(f"{run.folder} has not finished: train it to its end, or leave it out")
    net = build_without_values(restored.build_network)
    summary = summarize(net, (restored.in_channels, *size))
    last = summary.last_local_layer
    result, interval, images, answers = run.result(), None, None, Answers()
    top1 = result.get(top1_of(result.get("chosen_by")).key)
    if split is not None:
        folder = _evaluations(restored)[split]
        evaluation = json.loads((folder / EVALUATION).read_text())
        low, high = evaluation["intervals_95"]["top1"]
        top1, interval, images = evaluation["metrics"]["top1"], (low, high), evaluation["images"]
        answers = _answers(folder / PREDICTIONS)
    return ComparedRun(
        run.name, str(run.folder), restored.network, restored.dataset_facts().name,
        restored.split_digest("train") or "", restored.split_digest(split or "val") or "",
        describe_size(size), top1, interval, images,
        summary.num_parameters, summary.macs / 1e9,
        None if last is None or last.local_size is None else float(max(last.local_size)),
        _rate(run), restored.build_recipe().epochs, _hours(run), answers,
    )  # fmt: skip


def rank_runs(runs: Sequence[ComparedRun]) -> list[ComparedRun]:
    """Return the runs by top-1, the best first; of equal ones the one with fewer multiply-adds."""
    return sorted(runs, key=lambda run: (-1.0 if run.top1 is None else -run.top1, run.gmacs, run.name))


def compare_neighbours(runs: Sequence[ComparedRun]) -> list[Neighbours]:
    """Compare each ranked run with the next one, where both have answers to the same images."""
    found = []
    for better, worse in pairwise(runs):
        same = better.top1_images == worse.top1_images  # keys may be equal in other data sets
        if better.answers and same and better.answers.keys() == worse.answers.keys():
            pairs = [(right, worse.answers[image]) for image, right in better.answers.items()]
            alone = sum(one and not other for one, other in pairs), sum(other and not one for one, other in pairs)
            found.append(Neighbours(better.name, worse.name, *alone, mcnemar_p(*alone)))
    return found


def find_pareto_front(runs: Sequence[ComparedRun], costs: Sequence[float | None]) -> list[str]:
    """Return the runs that no other one beats in top-1 at the same or a lower cost."""
    known = [(run, cost) for run, cost in zip(runs, costs, strict=True) if cost is not None and run.top1 is not None]
    front, best = [], -1.0
    for run, _ in sorted(known, key=lambda one: (one[1], -(one[0].top1 or 0.0))):
        if run.top1 is not None and run.top1 > best:
            front.append(run.name)
            best = run.top1
    return front


def _evaluations(restored: RestoredRun) -> dict[str, Path]:
    """Return the folders of evaluations of the run's own images with its best weights, by split."""
    image_size = describe_size(restored.build_evaluation_crop().image_size)
    own = {"weights_sha256": restored.weights_sha256, "image_size": image_size}
    found: dict[str, Path] = {}
    for file in sorted(restored.run.evaluation.glob(f"*/{EVALUATION}")):
        try:
            evaluation = json.loads(file.read_text())
            images = restored.split_digest(str(evaluation["split"]))
            is_own = all(str(evaluation[name]) == value for name, value in own.items())
            is_own = is_own and evaluation.get("split_digest") == images
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error}): evaluate the run again") from error
        if is_own and (file.parent / PREDICTIONS).is_file():
            found.setdefault(str(evaluation["split"]), file.parent)
    return found


def _answers(file: Path) -> Answers:
    table = pq.read_table(file, columns=["shard", "key", "right"])
    shards, keys, right = (table.column(name).to_pylist() for name in ("shard", "key", "right"))
    return dict(zip(zip(shards, keys, strict=True), right, strict=True))


def _rate(run: Run) -> float | None:
    """Return the median of the images per second of a training."""
    rates = [point.values[RATE] for point in run.journal.points() if RATE in point.values]
    return statistics.median(rates) if rates else None


def _hours(run: Run) -> float:
    times = [point.time for point in run.journal.points() if point.step > 0]
    intervals = [max(0.0, after - before) for before, after in pairwise(times)]
    if not intervals:
        return 0.0
    longest = max(PAUSE_SECONDS, PAUSE_MEDIANS * statistics.median(intervals))
    return sum(one for one in intervals if one <= longest) / 3600
