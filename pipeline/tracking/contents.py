"""A run's page as its folder defines it: parameters, files, scores of evaluations, status."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.build.parameters import recorded_parameters
from pipeline.cli.secrets import mask_secrets
from pipeline.runs.run import Run
from pipeline.runs.status import State, read_state

MAX_PARAMETER_LENGTH = 6000  # characters that MLflow stores
EVALUATION = "evaluation.json"  # the last file of an evaluation
REPORT_PAGE, LAYER_TABLE = "report.html", "layers.json"
RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"  # MLflow's names
STATUS = {State.FINISHED: FINISHED, State.FAILED: FAILED, State.STOPPED: KILLED}


class Score(NamedTuple):
    """A metric of an evaluation, which MLflow shows at step 0; `milliseconds` is when it was written, in Unix time."""

    key: str
    value: float
    milliseconds: int


def parameters_of(run: Run) -> dict[str, object]:
    """Return the parameters of a run from its recorded config. Raises: FileNotFoundError, ValueError."""
    return recorded_parameters(run.config_file)


def sent_parameters(parameters: Mapping[str, object]) -> dict[str, str]:
    """Return parameters as MLflow gets them. Every parameter passes here.

    They are written as on the command line: null, true, 0.1, [0.08, 1.0].
    """
    public = mask_secrets(parameters)
    words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in public.items()}
    return {key: value[:MAX_PARAMETER_LENGTH] for key, value in words.items()}


def files_of(run: Run) -> dict[str, Path]:
    """Return the files that belong on the page by their path among the artifacts."""
    report = run.initial_report
    files = {f"config/{run.config_file.name}": run.config_file}
    files |= {f"{report.name}/{name}": report / name for name in (REPORT_PAGE, LAYER_TABLE)}
    files[f"{run.augmented_images.parent.name}/{run.augmented_images.name}"] = run.augmented_images
    for numbers in _evaluations(run):
        for file in sorted(numbers.parent.iterdir()):
            if file.is_file() and not file.name.startswith("."):
                files[f"{run.evaluation.name}/{file.parent.name}/{file.name}"] = file
    return {path: file for path, file in files.items() if file.is_file()}


def scores_of(run: Run) -> Iterator[Score]:
    """Yield the finite metrics of the evaluations in the run's folder; `val/...` belongs to the training's curves."""
    for file in _evaluations(run):
        name, milliseconds = file.parent.name, file.stat().st_mtime_ns // 1_000_000
        numbers: dict[str, Any] = json.loads(file.read_text())
        error = numbers["calibration"]["expected_calibration_error"]
        prefix = "test" if name == "test" else f"{run.evaluation.name}/{name}"
        for key, value in {**numbers["metrics"], "calibration_error": error}.items():
            if value is not None:
                yield Score(f"{prefix}/{key}", float(value), milliseconds)


def due_status(run: Run) -> str | None:
    """Return the status for the page of a run whose process has ended; None while a process trains it."""
    if run.is_locked:
        return None
    if run.is_finished:
        return FINISHED
    state = read_state(run.status_file)
    return KILLED if state in (None, State.TRAINING) else STATUS[state]


def _evaluations(run: Run) -> list[Path]:
    return sorted(run.evaluation.glob(f"*/{EVALUATION}"))
