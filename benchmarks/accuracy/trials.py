"""Trainings whose accuracies are compared: each one a command, one thread each, as many at once as there are cores.

The answers are lines of JSON in a file, so a comparison that was stopped continues where it was.
"""

import argparse
import csv
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from data.shards.parallel import available_cores
from pipeline.runs.run import Run

ROOT = Path(__file__).resolve().parents[2]


class Trial(NamedTuple):
    """A training: its name, the command, the folders where it runs and writes, a reader of its curves."""

    name: str
    command: Sequence[str]
    root: Path
    out: Path
    read_curves: Callable[[Path], Mapping[str, list[float]]]


class Answer(NamedTuple):
    """Evaluations, and the seconds of the command.

    `averaged` is the top-1 of averaged weights, where they are evaluated beside the others; timm evaluates only them.
    """

    name: str
    top1: list[float]
    loss: list[float]
    seconds: float
    averaged: Sequence[float] = ()


def _folder(out: Path, name: str) -> Path:
    return out / re.sub(r"[^\w.]+", "-", name).strip("-")


def _convoy_curves(run: Path) -> Mapping[str, list[float]]:
    values = [point.values for point in Run(run).journal.points()]
    names = {"top1": "val/top1", "loss": "val/loss", "averaged": "val_ema/top1"}
    return {key: [one[name] for one in values if name in one] for key, name in names.items()}


def convoy(name: str, words: Sequence[str], *, out: Path) -> Trial:
    """A training by `python -m pipeline.train`."""
    run = _folder(out, name)
    command = [sys.executable, "-m", "pipeline.train", *words, f"out={run}", "tracking=none", "trainer=cpu"]
    return Trial(name, command, ROOT, run, _convoy_curves)


def _timm_curves(folder: Path) -> Mapping[str, list[float]]:
    with (folder / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {"top1": [float(row["eval_top1"]) / 100 for row in rows], "loss": [float(row["eval_loss"]) for row in rows]}


def timm(name: str, words: Sequence[str], *, out: Path, clone: Path) -> Trial:
    """A training by `train.py` of a clone of timm."""
    folder = _folder(out, name)
    own = ["--output", str(out), "--experiment", folder.name, "--device", "cpu"]
    return Trial(name, [sys.executable, "train.py", *words, *own], clone, folder, _timm_curves)


def _run(trial: Trial) -> Answer:
    shutil.rmtree(trial.out, ignore_errors=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(trial.root)}
    start = time.monotonic()
    ended = subprocess.run(trial.command, check=False, cwd=trial.root, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(trial.command)}\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}")
    return Answer(trial.name, **trial.read_curves(trial.out), seconds=time.monotonic() - start)


def run_trials(trials: Iterable[Trial], *, answers: Path) -> dict[str, Answer]:
    """Run those trials that have no answer yet; return all answers by name."""
    lines = answers.read_text().splitlines() if answers.exists() else []
    before = [Answer(**json.loads(line)) for line in lines]
    known = {answer.name: answer for answer in before}
    missing = [trial for trial in trials if trial.name not in known]
    with ThreadPoolExecutor(available_cores()) as pool:
        futures = [pool.submit(_run, trial) for trial in missing]
        for future in as_completed(futures):
            if future.exception() is not None:
                pool.shutdown(wait=False, cancel_futures=True)  # those that run end first
            answer = future.result()
            known[answer.name] = answer
            with answers.open("a") as file:
                file.write(json.dumps(answer._asdict()) + "\n")
            print(
                f"{answer.name}: top-1 {answer.top1[-1]:.4f} after {answer.seconds:.0f} s", file=sys.stderr, flush=True
            )
    return known


def describe_top1(shares: Iterable[float]) -> str:
    """Return mean and standard deviation in percent; nothing without a value."""
    top1 = [100 * share for share in shares]
    deviation = f" ± {statistics.stdev(top1):.1f}" if len(top1) > 1 else ""
    return f"{statistics.mean(top1):.1f}{deviation}" if top1 else ""


def option_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the options of every comparison: the photographs and the folder of its results."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def pack(images: Path, out: Path, *, classes: Sequence[str] | None = None, train: int, val: int) -> Path:
    """Pack the first images of each class of `images/train` and `images/test`; return the class folders.

    The data set is `out/shards`; nothing is done where it is already there.
    """
    folder = out / "images"
    if (out / "shards" / "dataset.json").exists():
        return folder
    for split, name, count in (("train", "train", train), ("test", "val", val)):
        for path in sorted((images / split).glob("*/")):
            if classes is None or path.name in classes:
                target = folder / name / path.name
                target.mkdir(parents=True, exist_ok=True)
                for image in sorted(path.glob("*.jpg"))[:count]:
                    (target / image.name).write_bytes(image.read_bytes())
    pack_folders(folder, out / "shards")
    return folder


def pack_folders(images: Path, shards: Path) -> Path:
    """Pack class folders, unless that has been done; return `shards`."""
    if not (shards / "dataset.json").exists():
        words = [f"source.root={images}", "source=folder", "name=photos", f"out={shards}"]
        subprocess.run([sys.executable, "-m", "pipeline.pack", *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return shards
