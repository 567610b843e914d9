"""A thread that keeps the page of a run up to date, so that a slow or dead server never holds up a training."""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from threading import Event, Thread

from pipeline.runs.run import Run
from pipeline.tracking.contents import RUNNING, due_status
from pipeline.tracking.page import Page, UnsendableRun

IMPORT_SECONDS = 120.0  # for MLflow's import, which takes long on a busy network file system
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0  # between tries; the pause doubles
LAST_TRIES = 3  # after the end
SECONDS_BETWEEN_REQUESTS = 1.0  # so that a training which logs often pays for one request a second
POLL_SECONDS = 0.05


class Mirror:
    """Sends what a page lacks in a separate thread, in order, until nothing is missing; tries again after failures.

    With `trains` the page is RUNNING until the end, and pages of other runs in the folder that their processes left
    RUNNING get their end. The thread uses the page and writes `problem`, the reason why the last try failed, and
    `is_unsendable`; the caller's thread writes `_status`, `_is_ending` and `_is_abandoned`.
    """

    def __init__(self, page: Page, *, trains: bool = False) -> None:
        self.page = page
        self.problem: str | None = None
        self.is_unsendable = False
        self._trains, self._sends_files = trains, True
        self._others = running_pages(page) if trains else iter(())
        self._status: str | None = None
        self._is_ending = self._is_abandoned = False
        self._has_loaded, self._has_tried, self._has_news, self._has_ended = Event(), Event(), Event(), Event()
        self._thread = Thread(target=self._run, name="tracking", daemon=True)

    def start(self, *, seconds: float) -> None:
        """Start the thread; wait for MLflow's import, and then up to `seconds` for the first answer or failure."""
        self._thread.start()
        self._has_loaded.wait(IMPORT_SECONDS)
        self._has_tried.wait(seconds)

    def wake(self) -> None:
        """Look for something new; returns at once."""
        self._has_news.set()

    def finish(self, status: str | None, *, seconds: float, stall_seconds: float) -> str | None:
        """Wait up to `seconds` until everything is sent, at most `stall_seconds` for each answer; return the problem.

        A page that has every point gets the status; None leaves it as it is.
        """
        self._status, self._is_ending = status, True
        self._has_ended.set()
        self._has_news.set()
        num_calls, now = self.page.num_calls, time.monotonic()
        end, stall_end = now + seconds, now + stall_seconds
        while self._thread.is_alive() and now < min(end, stall_end):
            self._thread.join(POLL_SECONDS)
            now = time.monotonic()
            if self.page.num_calls != num_calls:
                num_calls, stall_end = self.page.num_calls, now + stall_seconds
        if not self._thread.is_alive():
            return self.problem
        self._is_abandoned = True
        return self.problem or f"MLflow at {self.page.store.printed_address} does not answer in time"

    def _run(self) -> None:
        pause, last_tries = FIRST_PAUSE_SECONDS, 0
        while not self._is_abandoned:
            self._has_news.clear()  # first, so that no news is lost
            is_last = self._is_ending
            try:
                self._send(is_last=is_last)
                self.problem = None
            except UnsendableRun as error:
                self.problem, self.is_unsendable = str(error), True
                break
            except Exception as error:  # noqa: BLE001  # a backend may raise anything; none of it may end a training
                self.problem = self.page.store.failure(error)
                self.page.forget()
            finally:
                self._has_tried.set()
            last_tries += is_last
            if last_tries == LAST_TRIES or (is_last and self.problem is None):
                break
            if self.problem is not None:
                self._rest(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            elif not self._end_next_page():
                pause = FIRST_PAUSE_SECONDS
                self._rest(SECONDS_BETWEEN_REQUESTS)
                self._has_news.wait()

    def _send(self, *, is_last: bool) -> None:
        try:
            self.page.store.load()
        finally:
            self._has_loaded.set()
        if self._trains and not is_last:
            self.page.set_status(RUNNING)
        self.page.send_points()
        if is_last and self._status is not None:
            self.page.set_status(self._status)
        if self._sends_files or is_last:
            try:
                self.page.send_files()
            except Exception:  # an artifact store may raise anything, and must not delay points
                if is_last:
                    raise
                # The files are tried again at the end.
                self._sends_files = False
                self.page.forget()

    def _rest(self, seconds: float) -> None:
        """Pause; the end interrupts it once, after which pauses are short."""
        if self._is_ending:
            time.sleep(FIRST_PAUSE_SECONDS)
        else:
            self._has_ended.wait(seconds)

    def _end_next_page(self) -> bool:
        """Give one page of a run whose process is gone its end; return whether there may be more."""
        try:
            run = next(self._others, None)
            if run is not None:
                end_page(Page(run, self.page.store))
        except Exception:  # noqa: BLE001  # a damaged run or a dead server: the next training or sync tries again
            return True
        return run is not None


def running_pages(page: Page) -> Iterator[Run]:
    """Yield the other runs of a page's folder that MLflow calls RUNNING although no process trains them."""
    client, experiment_id = page.store.open()
    running = client.search_runs([experiment_id], "attributes.status = 'RUNNING'", max_results=1000)
    ids = {one.info.run_id for one in running}
    for folder in sorted(page.run.folder.absolute().parent.iterdir()):
        run = Run(folder)
        is_other = run.folder != page.run.folder.absolute()
        if is_other and run.tracking_id in ids and is_ended(run):
            yield run


def is_ended(run: Run) -> bool:
    """Whether the process of a run is gone; a folder that this user cannot lock belongs to someone else."""
    return os.access(run.folder, os.W_OK) and not run.is_locked


def end_page(page: Page) -> None:
    """Send what a page lacks and give it the status of a run whose process is gone. Raises: anything."""
    with suppress(UnsendableRun):  # it gets its status nevertheless
        page.send_points()
    status = due_status(page.run)  # read last, because the run may have been started again
    if status is not None:
        page.set_status(status)
    page.send_files()
