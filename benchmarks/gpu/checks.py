"""The form of a check: a claim, a limit, and a function that finds figures and whether the claim holds."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from data.children import end_with_me, end_with_parent

STOPPED = "stopped"  # the error of a check that a signal to the program has ended
ROOT = Path(__file__).resolve().parents[2]
Figures = Mapping[str, Any]
FIGURE, ANSWER = "figure ", "answer "  # how the lines begin that a check prints for the program


@dataclass(frozen=True)
class Answer:
    """What a check found; `holds` is None where there is nothing to demand."""

    holds: bool | None
    figures: Figures


@dataclass(frozen=True)
class Check:
    """A claim about a device, with the seconds after which its process is killed."""

    name: str
    claim: str
    seconds: int
    run: Callable[[torch.device], Answer]
    on_cpu: bool = True  # whether it has a meaning on a CPU
    alone: bool = False  # whether it measures time or memory, so that no other may run beside it


@dataclass(frozen=True)
class Result:
    """The answer of a check's process, or how the process ended without one."""

    check: str
    claim: str
    holds: bool | None
    seconds: float
    figures: Figures
    error: str | None = None

    def to_json(self) -> str:
        """The result as one line."""
        return json.dumps(vars(self), default=str)


class PrintedFigures(dict[str, object]):
    """Figures that are printed as they become known, so that a check that is stopped has said them."""

    def __setitem__(self, name: str, value: object) -> None:
        super().__setitem__(name, value)
        print(FIGURE + json.dumps({name: value}, default=str), flush=True)


def run_here(check: Check, device: torch.device) -> None:
    """Run a check in this process and print its answer."""
    end_with_parent()
    answer = check.run(device)
    print(ANSWER + json.dumps({"holds": answer.holds, "figures": answer.figures}, default=str), flush=True)


class Runner:
    """Runs checks in other processes, in threads of this one, which a signal interrupts."""

    def __init__(self, device: str) -> None:
        self._device, self._stopping = device, threading.Event()
        self.results: list[Result] = []

    def run(self, checks: Iterable[Check], *, workers: int) -> None:
        """Run checks, so many at a time, and print a line for each; after an interruption none is begun.

        Raises: KeyboardInterrupt, with the results of the checks that it ended.
        """
        with ThreadPoolExecutor(workers) as threads:
            try:
                wait([threads.submit(self._run, check) for check in checks])
            except KeyboardInterrupt:
                self._stopping.set()
                threads.shutdown(wait=False, cancel_futures=True)
                kill_processes(psutil.Process())
                raise

    def _run(self, check: Check) -> None:
        result = run_apart(check, self._device)
        if self._stopping.is_set():
            result = replace(result, holds=None, error=STOPPED)
        self.results.append(result)
        print(result.to_json(), flush=True)


def kill_processes(parent: psutil.Process) -> None:
    """Kill all processes that a process has started, and those that they have."""
    for one in parent.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            one.kill()


def run_apart(check: Check, device: str) -> Result:
    """Run a check in another process; a crash or a hang is a result. Its files are removed however it ended."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", device, "--one", check.name]
    start, error = time.perf_counter(), None
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder:
        environment = {**os.environ, **end_with_me(), "TMPDIR": folder}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **streams)
        try:
            output, errors = process.communicate(timeout=check.seconds)
        except subprocess.TimeoutExpired:
            kill_processes(psutil.Process(process.pid))
            process.kill()
            output, errors = process.communicate()
            error = f"no answer in {check.seconds} s"
    seconds = round(time.perf_counter() - start, 1)
    if error is None and process.returncode != 0:
        print(errors, file=sys.stderr, flush=True)
        lines = [line for line in errors.splitlines() if line.strip()] or ["no message"]
        killed = signal.Signals(-process.returncode).name if process.returncode < 0 else f"exit {process.returncode}"
        error = f"{killed}: {lines[-1].strip()}"
    figures: dict[str, object] = {}
    for line in output.splitlines():
        if line.startswith(FIGURE):
            figures |= json.loads(line.removeprefix(FIGURE))
    answers = [json.loads(line.removeprefix(ANSWER)) for line in output.splitlines() if line.startswith(ANSWER)]
    if not answers:
        return Result(check.name, check.claim, False, seconds, figures, error or "it ended without an answer")
    (answer,) = answers
    return Result(check.name, check.claim, False if error else answer["holds"], seconds, answer["figures"], error)


def table(results: Iterable[Result]) -> str:
    """The results for people, a line each, as a table in Markdown."""
    words = {True: "yes", False: "**no**", None: "measured"}
    lines = ["| check | holds | seconds | claim | found |", "|---|---|--:|---|---|"]
    for one in results:
        holds, error = (STOPPED, None) if one.error == STOPPED else (words[one.holds], one.error)
        found = "; ".join([*filter(None, [error]), *(f"{name} {value}" for name, value in one.figures.items())])
        lines.append(f"| {one.check} | {holds} | {one.seconds:.0f} | {one.claim} | {found} |")
    return "\n".join(lines)


def summary(results: Sequence[Result]) -> str:
    """How many claims hold, and the names of those that do not."""
    failed = [one.check for one in results if one.holds is False]
    held, measured = (sum(one.holds is value for one in results) for value in (True, None))
    refuted = f"{len(failed)} do not: {', '.join(failed)}" if failed else "none is refuted"
    return f"{held} of {len(results)} claims hold, {refuted}; {measured} were measured without a verdict."
