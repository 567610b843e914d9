"""What a study prints: a line for each step that has ended, and a table of its trainings."""

import json
import signal
from collections.abc import Container, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.table import Table

from models.learning.evaluation import top1_of
from pipeline.cli.signals import EXIT_CODES
from pipeline.engines.snakemake import Ended
from pipeline.engines.study import Step

SHELL_SIGNALS = 128  # plus a signal: the exit code of what it has killed
MEMORY = " (the kernel does this when memory is full)"


def describe_end(ended: Ended, folder: Path) -> str:
    """Return the line of a step that has ended: its result, the signal that killed it, or the last error of its log."""
    step, time = ended.step, timedelta(seconds=ended.seconds)
    if ended.code == 0:
        found = _top1(step)
        return f"{step.identity}  {time}{'' if found is None else f'  top-1 {found:.4f}'}"
    log = folder / "logs" / step.verb / f"{step.name}.log"
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    causes = [line for line in lines if line.startswith("error: ")]  # srun adds lines
    killed = ended.code - SHELL_SIGNALS
    if killed in set(signal.Signals) and killed not in EXIT_CODES:
        causes = [f"killed by {signal.Signals(killed).name}{MEMORY if killed == signal.SIGKILL else ''}"]
    cause = (causes or lines or [""])[-1]
    return f"{step.identity}  {time}  failed with exit code {ended.code}: {cause} ({log})"


def build_table(steps: Sequence[Step], *, current: Container[str], failed: Container[str]) -> Table:
    """Return the trainings with their top-1 on the split that chose the weights, and in each evaluation.

    Results of steps that are not `current` are left out: they belong to another command or to earlier inputs.
    """
    trainings = [step for step in steps if step.verb == "train"]
    evaluations = [step for step in steps if step.verb == "evaluate"]
    columns = list(dict.fromkeys(step.name.partition("/")[2] for step in evaluations))
    table = Table("run", "top-1 of the best checkpoint", *(f"top-1, evaluation {name}" for name in columns))
    for training in trainings:
        found = {step.name: _cell(step, current=current, failed=failed) for step in evaluations}
        table.add_row(
            training.name,
            _cell(training, current=current, failed=failed),
            *(found.get(f"{training.name}/{name}", "") for name in columns),
        )
    return table


def _cell(step: Step, *, current: Container[str], failed: Container[str]) -> str:
    if step.identity in failed:
        return "failed"
    value = _top1(step) if step.identity in current else None
    return "" if value is None else f"{value:.4f}"


def _top1(step: Step) -> float | None:
    if step.verb not in ("train", "evaluate") or not step.result.is_file():
        return None
    found: dict[str, Any] = json.loads(step.result.read_text())
    return found.get(top1_of(found.get("chosen_by")).key) if step.verb == "train" else found["metrics"].get("top1")
