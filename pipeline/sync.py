"""Send to MLflow what it lacks of runs: `python -m pipeline.sync`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from pipeline.cli.errors import FAILURE, ConfigError
from pipeline.cli.run import fast_imports, run_verb
from pipeline.cli.verb import Verb

if TYPE_CHECKING:
    from pipeline.runs.run import Run

VERB = Verb(
    "sync",
    "Send to MLflow what it lacks of runs: parameters, points, files, status.",
    {
        "": "all runs in runs/ except those trained with tracking=none",
        "runs/NAME": "one run",
        "runs/NAME tracking.uri=http://HOST:5000": "to another server than MLFLOW_TRACKING_URI or mlflow.db",
    },
    text_keys=("run", "runs"),
    positional="run",
)


def main(config: DictConfig) -> None:
    """Print a line for each run; exit with code 2 where something could not be sent."""
    with fast_imports():
        from pipeline.build.objects import build_object
        from pipeline.cli.console import main_console, print_line
        from pipeline.tracking.mlflow_tracker import MLflowTracker
        from pipeline.tracking.tracker import Tracker

    tracker, is_complete = build_object(config, "tracking", kind=Tracker), True
    if not isinstance(tracker, MLflowTracker):
        raise ConfigError("sync needs tracking=mlflow")
    runs = _find_runs(config)
    if not runs:
        print_line(main_console(), f"{config.runs} has no run with a dashboard: name one to send it")
    for number, run in enumerate(runs, start=1):
        sent = tracker.send(run)
        line = f"{run.folder}: sent {sent.num_points:,} points, {sent.num_files:,} files; {sent.problem or 'complete'}"
        print_line(main_console(), line)
        is_complete = is_complete and sent.problem is None
        if not sent.is_answered:
            if number < len(runs):
                print_line(main_console(), f"{len(runs) - number} more runs were not tried")
            break
    if not is_complete:
        raise SystemExit(FAILURE)


def _find_runs(config: DictConfig) -> list[Run]:
    """Return the run that the config names, or all that were trained with a dashboard."""
    from pipeline.runs.find import all_runs, find_run

    folder = Path(str(config.runs))
    if config.run is not None:
        return [find_run(str(config.run), runs=folder).run]
    return [run for run in all_runs(folder) if _has_dashboard(run)]


def _has_dashboard(run: Run) -> bool:
    from pipeline.build.parameters import recorded_parameters
    from pipeline.tracking.tracker import Tracker

    try:
        target = recorded_parameters(run.config_file).get("tracking._target_")
    except (ValueError, OSError):  # the line of the run will say so
        return True
    return target != f"{Tracker.__module__}.{Tracker.__qualname__}"


if __name__ == "__main__":
    run_verb(VERB, main)
