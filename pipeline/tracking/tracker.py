"""The interface between a run and a dashboard."""

from collections.abc import Mapping
from pathlib import Path

from pipeline.runs.run import Run


class Tracker:
    """Mirrors a run on a dashboard. Nothing it does may slow or end the run. This base class sends nothing.

    `link` is the address of the run's page, None without one; `command` serves it where no server runs.
    """

    link: str | None = None
    command: str | None = None

    def start(self, run: Run, parameters: Mapping[str, object], *, logged: Mapping[str, int]) -> str | None:
        """Create a run, or continue the one that has each curve up to the step in `logged`.

        `parameters` are logged by dotted key. Returns the reason when the server refuses, None otherwise.
        """
        return None

    def attach(self, run: Run) -> str | None:
        """Continue the page of a run that has one, to add to it. Returns the reason when that is impossible."""
        return None

    def detach(self) -> str | None:
        """Wait for what was added. Returns what did not arrive and why, None when everything did."""
        return None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each curve; `step` counts optimizer steps."""

    def log_file(self, path: Path, folder: str) -> None:
        """Store a file among the run's artifacts."""

    def log_table(self, table: Mapping[str, list[object]], file: str) -> None:
        """Store a table, by column, as an artifact whose name ends in .json."""

    def finish(self, *, succeeded: bool) -> str | None:
        """End the run. Returns what did not arrive and why, None when everything did."""
        return None
