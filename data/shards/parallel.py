"""Many tasks in parts for several machines, and in several processes on one, with a progress bar or progress lines."""

import multiprocessing
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data.arguments import require

Task = TypeVar("Task")
Result = TypeVar("Result")
Work = TypeVar("Work")

MERGE = "merge"  # in place of a part: all parts are done
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # cgroup v2, as mounted inside a container
SECONDS_BETWEEN_LINES = 10.0
BINDING = re.compile("(mask|map|rank)(?!_ldom)")  # Slurm's kinds of binding that give each task its own cores


def available_cores() -> int:
    """Return the number of usable cores: taskset, Slurm and container limits can make it smaller than the machine's."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = CPU_QUOTA.read_text().split()  # microseconds of CPU per microseconds of time, or "max"
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


class CoreShare(NamedTuple):
    """The cores of one process among those on its machine, and how they were counted."""

    cores: int
    reason: str


def share_of_cores(local_ranks: int) -> CoreShare:
    """Return this rank's share of the usable cores, which are divided by the ranks that share them.

    Those are the ranks on the machine; where Slurm has given each of its tasks its own cores, by a mask or by
    `SLURM_CPUS_PER_TASK`, those of one task: one under srun, several where torchrun or Lightning starts them in it.
    """
    cores, reason, ranks = available_cores(), "", local_ranks
    tasks = int((re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")) or ["1"])[0])
    per_task = os.environ.get("SLURM_CPUS_PER_TASK")
    if "SLURM_PROCID" in os.environ and per_task is not None:
        cores, reason, ranks = min(cores, int(per_task)), f" (SLURM_CPUS_PER_TASK={per_task})", local_ranks // tasks
    elif BINDING.match(os.environ.get("SLURM_CPU_BIND_TYPE", "none")):
        reason, ranks = " (bound by Slurm)", local_ranks // tasks
    shared = f" for {ranks} ranks" if ranks > 1 else ""
    return CoreShare(max(1, cores // max(1, ranks)), f"{cores} cores{shared}{reason}")


@dataclass(frozen=True)
class Part:
    """Part `number` of `count`, from 1 on. Raises: ArgumentError when there is no such part."""

    number: int
    count: int

    def __post_init__(self) -> None:
        require(1 <= self.number <= self.count, "is not one of 1/N to N/N", part=self)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def of(self, work: Sequence[Work]) -> Sequence[Work]:
        """Return this part's share of the work."""
        return work[self.number - 1 :: self.count]


def parse_part(text: str) -> Part | None:
    """Return the part that `3/16` means, None for MERGE. Raises: ArgumentError for another text."""
    match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    require(match is not None or text == MERGE, f"is neither a part, as in 3/16, nor {MERGE}", part=text)
    return Part(int(match[1]), int(match[2])) if match else None


def map_tasks(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    sizes: Sequence[int],
    workers: int,
    label: str,
    unit: str,
) -> list[Result]:
    """Apply `function` to each task in `workers` processes, in order; progress counts the tasks' `sizes` in `unit`.

    A few tasks are made ahead of those that run, so all of them need not fit in memory.
    """
    show = partial(_show_progress, label=label, unit=unit, sizes=sizes)
    if workers <= 1 or len(sizes) <= 1:
        return list(show(map(function, tasks)))
    # forkserver: fork would copy the locks of torch's threads, spawn would import everything once per worker.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([getattr(function, "func", function).__module__])  # .func: that of a partial
    with ProcessPoolExecutor(min(workers, len(sizes)), mp_context=context) as pool:
        return list(show(_results(lambda task: pool.submit(function, task), tasks, ahead=4 * workers)))


def _results(submit: Callable[[Task], Future[Result]], tasks: Iterable[Task], *, ahead: int) -> Iterator[Result]:
    """Yield the results in order, with at most `ahead` tasks submitted. After an error no other task starts."""
    submitted: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            submitted.append(submit(task))
            if len(submitted) == ahead:
                yield submitted.popleft().result()
        while submitted:
            yield submitted.popleft().result()
    finally:
        for future in submitted:
            future.cancel()


def _show_progress(results: Iterable[Result], *, label: str, unit: str, sizes: Sequence[int]) -> Iterator[Result]:
    console = Console(stderr=True)
    total, done, last_line = sum(sizes), 0, time.monotonic()
    text, count = TextColumn("{task.description}"), MofNCompleteColumn()
    columns = (text, BarColumn(), count, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(label, total=total)
        for result, size in zip(results, sizes, strict=True):
            done += size
            progress.advance(bar, size)
            if not console.is_terminal and time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                console.print(f"{label}: {done:,} of {total:,} {unit}")
            yield result
