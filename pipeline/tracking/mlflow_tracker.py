"""MLflow as the dashboard of a run: a local database or a server, through a mirror in a separate thread."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pipeline.runs.run import Run
from pipeline.runs.status import State
from pipeline.tracking.contents import STATUS, due_status
from pipeline.tracking.mirror import Mirror, is_ended
from pipeline.tracking.page import Page
from pipeline.tracking.store import Store
from pipeline.tracking.tracker import Sent, Tracker

# For the first answer. A new local database takes seconds, and the page's link is worth them.
START_SECONDS, LOCAL_START_SECONDS = 2.0, 30.0
FINAL_SECONDS = {State.FINISHED: 60.0, State.STOPPED: 5.0, State.FAILED: 5.0}
STALL_SECONDS = 15.0  # for one answer: more than a request may take
UPLOAD_SECONDS = 300.0  # for one answer to `sync`, which is a file at most


class MLflowTracker(Tracker):
    """A run in MLflow: a SQLite file in the working folder by default, any server by `uri` or MLFLOW_TRACKING_URI."""

    shows_reports = True

    def __init__(self, *, uri: str | None = None, experiment: str = "convoy") -> None:
        self.store = Store(uri, experiment=experiment)
        self._mirror: Mirror | None = None

    @property
    def link(self) -> str | None:
        """The address of the run's page, None before the server has answered."""
        return None if self._mirror is None else self._mirror.page.link

    @property
    def command(self) -> str | None:
        """The command that serves the page of a local database."""
        if self.store.is_server:
            return None
        return "make ui" if self.store.is_default else f"mlflow ui --backend-store-uri {self.store.printed_address}"

    def start(self, run: Run, parameters: Mapping[str, object]) -> str | None:
        """Start the mirror; wait 2 seconds at most for a server, 30 for a local database."""
        restarts = next(run.journal.points(), None) is None
        page = Page(run, self.store, parameters=parameters, restarts=restarts)
        self._mirror = Mirror(page, trains=True)
        self._mirror.start(seconds=LOCAL_START_SECONDS if self.store.file else START_SECONDS)
        if page.link is not None:
            return None
        slow = f"MLflow at {self.store.printed_address} has not answered yet"
        return f"{self._mirror.problem or slow}; the training does without it and sends everything when it answers"

    def update(self) -> None:
        """Wake the mirror."""
        if self._mirror is not None:
            self._mirror.wake()

    def finish(self, state: State) -> str | None:
        """Set FINISHED, KILLED or FAILED; wait as long as the server answers, 60 s at most, 5 s without success."""
        if self._mirror is None:
            return None
        seconds, mirror = FINAL_SECONDS[state], self._mirror
        problem = mirror.finish(STATUS[state], seconds=seconds, stall_seconds=min(seconds, STALL_SECONDS))
        where = f" tracking.uri={self.store.printed_address}" if self.store.is_given else ""
        return problem and f"{problem}; python -m pipeline.sync {mirror.page.run.folder}{where} sends the rest"

    def send(self, run: Run) -> Sent:
        """Send what the page of a run lacks, as long as the server answers, and its end unless a process trains it."""
        page = Page(run, self.store)
        mirror = Mirror(page)
        mirror.start(seconds=0)
        status = due_status(run) if is_ended(run) else None
        problem = mirror.finish(status, seconds=math.inf, stall_seconds=UPLOAD_SECONDS)
        return Sent(page.num_points, page.num_files, problem, page.link is not None or mirror.is_unsendable)
