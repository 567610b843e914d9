"""A bounded queue in front of a server, so that a slow or dead one never holds up a training."""

import time
from collections.abc import Callable
from contextlib import suppress
from queue import Full, Queue
from threading import Thread

CAPACITY = 10_000  # tasks that may wait for a slow server
MESSAGE_LENGTH = 160  # characters of an error's first line


class BackgroundQueue:
    """Run tasks in order on a separate thread; count those that fail or find the queue full.

    The caller's thread writes `num_lost` when the queue is full, the worker thread when a task fails.
    `expected` are the exceptions of a task that mean a lost message; others are bugs.
    """

    def __init__(self, *expected: type[Exception]) -> None:
        self.expected = expected
        self.last_error: str | None = None
        self.num_lost = 0
        self._tasks: Queue[Callable[[], object] | None] = Queue(CAPACITY)
        self._thread: Thread | None = None

    def put(self, task: Callable[[], object]) -> None:
        """Add a task and return at once."""
        if self._thread is None:
            self._thread = Thread(target=self._run, name="tracking", daemon=True)
            self._thread.start()
        try:
            self._tasks.put_nowait(task)
        except Full:
            self.num_lost += 1

    def finish(self, timeout: float) -> str | None:
        """Wait up to `timeout` seconds for the tasks; return how many were lost and why, None if none were."""
        if self._thread is not None:
            deadline = time.monotonic() + timeout
            with suppress(Full):
                self._tasks.put(None, timeout=timeout)
            self._thread.join(max(0.0, deadline - time.monotonic()))
            self.num_lost += self._tasks.qsize()
        if self.last_error is None and not self.num_lost:
            return None
        return f"the dashboard lacks {self.num_lost} messages: {self.last_error or 'the server is too slow'}"

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except self.expected as error:
                self.last_error = first_line(error)
                self.num_lost += 1


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, shortened."""
    line = str(error).partition("\n")[0]
    return line if len(line) <= MESSAGE_LENGTH else f"{line[:MESSAGE_LENGTH]}..."
