"""The interface between a run and a dashboard."""

from collections.abc import Mapping
from typing import NamedTuple

from pipeline.runs.run import Run
from pipeline.runs.status import State


class Sent(NamedTuple):
    """Number of points and files sent to a dashboard, and the problem with the rest, None where nothing is missing.

    `is_answered` is false where the dashboard does not answer, so that other runs need not be tried.
    """

    num_points: int = 0
    num_files: int = 0
    problem: str | None = None
    is_answered: bool = True


class Tracker:
    """Mirrors a run on a dashboard. Nothing it does may slow or end the run. This base class does nothing.

    `shows_reports` is true where the report of the network is worth half a second at the start.
    """

    shows_reports = False

    @property
    def link(self) -> str | None:
        """The address of the run's page, None without one."""
        return None

    @property
    def command(self) -> str | None:
        """The command that serves the page, None where a server runs."""
        return None

    def start(self, run: Run, parameters: Mapping[str, object]) -> str | None:
        """Create the page of a run, or continue it; `parameters` are logged by dotted key.

        Returns the reason when the page is not there yet.
        """
        return None

    def update(self) -> None:
        """Send what is new in the run's journal and folder; returns at once."""

    def finish(self, state: State) -> str | None:
        """End the page; returns the reason when something is missing there, None when it has everything."""
        return None

    def send(self, run: Run) -> Sent:
        """Send what the page of a run lacks, and its end unless a process trains it."""
        return Sent()
