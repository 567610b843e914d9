"""Which run a command means: a folder, a name, an MLflow run id, `latest`, or one of its checkpoints."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pipeline.cli.errors import nearest
from pipeline.runs.run import Run

LATEST = "latest"
CHECKPOINT = ".ckpt"


class FoundRun(NamedTuple):
    """A run, and the checkpoint that was named, None for the best one."""

    run: Run
    checkpoint: Path | None = None


def find_run(text: str, *, runs: Path, key: str = "run") -> FoundRun:
    """Return the run that `text` means; names, ids and their beginnings are looked for in the folder `runs`.

    `key` is what users typed before it. Raises: FileNotFoundError when there is none, ValueError when several match.
    """
    path = Path(text)
    if path.suffix == CHECKPOINT:
        if not path.is_file():
            raise FileNotFoundError(f"{key}={text} does not exist")
        path = path.absolute()
        return FoundRun(Run(path.parent.parent), path)
    if _is_run(path):
        return FoundRun(Run(path if path.name else path.absolute()))
    known = {folder.name: Run(folder) for folder in _folders(runs) if _is_run(folder)}
    if path.is_dir() and text not in known:  # a folder of photographs may have the name of a run
        raise FileNotFoundError(f"{key}={text} is not a run: it has no {Run(path).config_file.name}")
    if not known:
        raise FileNotFoundError(f"{key}={text} does not exist, and {runs} has no runs: give the folder of one")
    if text == LATEST:
        return FoundRun(max(known.values(), key=_changed))
    exact = [run for name, run in known.items() if text in (name, run.tracking_id)]
    matching = exact or [
        run for name, run in known.items() if name.startswith(text) or run.tracking_id.startswith(text)
    ]
    if not matching:
        raise FileNotFoundError(
            f"{key}={text} is not one of the {len(known)} runs in {runs}{nearest(text, list(known))}"
        )
    if len(matching) > 1:
        names = ", ".join(sorted(run.name for run in matching)[:3])
        raise ValueError(f"{key}={text} matches {len(matching)} runs: {names}")
    return FoundRun(matching[0])


def all_runs(runs: Path) -> list[Run]:
    """Return the runs in the folder `runs`, by name. Raises: FileNotFoundError when there is none."""
    found = [Run(folder) for folder in _folders(runs) if _is_run(folder)]
    if not found:
        raise FileNotFoundError(f"{runs} has no runs: runs=FOLDER sets the folder of all runs")
    return found


def _folders(runs: Path) -> Iterable[Path]:
    return sorted(one for one in runs.iterdir() if one.is_dir()) if runs.is_dir() else []


def _is_run(folder: Path) -> bool:
    return Run(folder).config_file.is_file()


def _changed(run: Run) -> float:
    """The time of its result, its last checkpoint or its beginning, whichever it has."""
    files = (run.result_file, run.last_checkpoint, run.config_file)
    return next(file.stat().st_mtime for file in files if file is not None and file.is_file())
