"""Signals that ask a program to stop: SIGTERM, SIGINT and SIGUSR1.

The first one makes a verb end: at once with SystemExit, or where a training defers it, after its step and a save. A
second one ends the process without a save, and so does the first one in a process that does not end.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from types import FrameType

# As a shell counts them. Schedulers send SIGUSR1 before a time limit; the job is to be continued as after SIGTERM.
EXIT_CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}
SAME_SECONDS = 1.0  # a signal to a group arrives several times, directly and from the launcher
END_SECONDS = 8.0  # limit for a verb's end
SAVE_SECONDS = 120.0  # limit for a training's step and save


class StopSignals:
    """The request of this process to stop.

    Python runs a handler in the main thread, between two of its instructions: not while that waits for another rank.
    So a thread reads the signals too. Both threads set `first` and `_since`, to equal values.
    """

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self._since = 0.0
        self._is_deferred = self._has_raised = self._has_succeeded = False

    @property
    def exit_code(self) -> int | None:
        """The exit code that the first signal asks for, None without one; 0 after success."""
        if self.first is None:
            return None
        return 0 if self._has_succeeded else EXIT_CODES[self.first]

    def install(self) -> None:
        """Handle the three signals. Only the main thread may call it."""
        read, write = socket.socketpair()
        for end in (read, write):
            end.setblocking(end is read)
        for number in EXIT_CODES:
            if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # as of a shell's background job
                signal.signal(number, self._handle)
        signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
        Thread(target=self._watch, args=(read, write), name="stop-signals", daemon=True).start()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only remember a signal in this block. Raises: SystemExit for one that has come before."""
        self._has_succeeded = False  # of a sweep, an earlier job has
        if self.exit_code is not None:
            raise SystemExit(self.exit_code)
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred, self._since = False, time.monotonic()

    def finish(self) -> None:
        """Raise no more: the process ends by itself, or is ended after END_SECONDS."""
        self._has_raised = True

    def succeed(self) -> None:
        """From here on, a signal ends the process with exit code 0: what it was started for is done."""
        self._has_succeeded = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._note(number)
        if not self._is_deferred and not self._has_raised:  # twice would cut off what the first one has begun to end
            self._has_raised = True
            raise SystemExit(self.exit_code)

    def _note(self, number: int) -> None:
        if self.first is None:
            self.first, self._since = signal.Signals(number), time.monotonic()

    def _watch(self, read: socket.socket, write: socket.socket) -> None:
        """End the process at a second signal, or when it has not ended in time. Keeps both sockets open."""
        while True:
            with suppress(TimeoutError):
                for number in read.recv(16):
                    if number in EXIT_CODES:
                        self._note(number)
                        if time.monotonic() - self._since > SAME_SECONDS:
                            self._end()
            if self.first is not None:
                passed = time.monotonic() - self._since
                read.settimeout(0.5)
                if passed > (SAVE_SECONDS if self._is_deferred else END_SECONDS):
                    self._end()

    def _end(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, RuntimeError):  # closed, or in use by the main thread
                stream.flush()
        os._exit(self.exit_code or 0)


stop_signals = StopSignals()
