"""Signals to a process that handles them as every verb does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.paths import ROOT
from tests.support.processes import interruptible

HEAD = """
import ctypes, signal, sys, threading, time
from pipeline.cli import signals
signals.END_SECONDS, signals.SAVE_SECONDS, signals.SAME_SECONDS = 0.5, 60.0, 0.05
signals.stop_signals.install()
def wait():
    print("ready", flush=True)
    threading.Event().wait(60)
"""

CLEANS_UP = """
try:
    wait()
finally:
    print("cleaned up", flush=True)
"""
DOES_NOT_END = """
while True:
    try:
        wait()
    except BaseException:
        pass
"""
DEFERS = """
with signals.stop_signals.deferred():
    print("ready", flush=True)
    while signals.stop_signals.first is None:
        time.sleep(0.01)
    print("noticed", signals.stop_signals.first.name, flush=True)
    while True:
        ctypes.CDLL(None).sleep(60)  # as in a collective: hardly any Python code runs in the main thread
"""
SUCCEEDS = """
signals.stop_signals.succeed()
wait()
"""
TIMES_OUT = """
from concurrent.futures import ThreadPoolExecutor
from pipeline.cli.errors import one_line_errors
from pipeline.cli.run import ended_by_timeouts
print("ready", flush=True)
with ended_by_timeouts(), one_line_errors():
    ThreadPoolExecutor().submit(time.sleep, 60)
    print("printed before")
    raise TimeoutError("the disk does not answer")
"""
STOPS = [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)]


@contextmanager
def running(script: str) -> Iterator[subprocess.Popen[str]]:
    """Start a script, and wait until it is ready."""
    command = [sys.executable, "-c", HEAD + script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with interruptible(), subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.mark.parametrize(("number", "code"), STOPS)
def test_a_signal_ends_a_verb_with_its_code_after_its_cleanup(number: signal.Signals, code: int) -> None:
    with running(CLEANS_UP) as process:
        process.send_signal(number)
        assert process.stdout is not None
        assert process.stdout.read() == "cleaned up\n"
        assert process.wait(30) == code


def test_a_timeout_ends_a_process_whose_threads_still_wait() -> None:
    with running(TIMES_OUT) as process:
        assert process.wait(30) == 2
        assert process.stdout is not None
        assert process.stdout.read() == "printed before\n"


def test_a_signal_after_success_leaves_the_exit_code_of_success() -> None:
    with running(SUCCEEDS) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_a_process_that_does_not_end_is_ended() -> None:
    with running(DOES_NOT_END) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143


@pytest.mark.parametrize(("number", "code"), STOPS)
def test_a_training_notices_the_first_signal_and_a_second_one_ends_it_at_once(
    number: signal.Signals, code: int
) -> None:
    with running(DEFERS) as process:
        process.send_signal(number)
        assert process.stdout is not None
        assert process.stdout.readline() == f"noticed {number.name}\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)  # a signal within SAME_SECONDS would be the same one
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == code
