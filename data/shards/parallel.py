"""Run one function over many tasks on all cores, with a progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Task = TypeVar("Task")
Result = TypeVar("Result")

SECONDS_BETWEEN_LINES = 10.0
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # cgroup v2, as a container sees its own


def available_cores() -> int:
    """Cores that this process may use: fewer than the machine has under taskset, Slurm or a container's limits."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = CPU_QUOTA.read_text().split()  # microseconds of CPU in microseconds of time, or "max"
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def map_tasks(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    workers: int,
    label: str,
    unit: str = "shards",
    sizes: Sequence[int] | None = None,
) -> list[Result]:
    """Apply `function` to each task in `workers` processes; results come in the order of the tasks.

    The progress counts `sizes`, so many `unit` a task; one of each without them. One worker is this process.
    """
    report = partial(_shown, label=label, unit=unit, sizes=sizes or [1] * len(tasks))
    if workers <= 1 or len(tasks) <= 1:
        return list(report(map(function, tasks)))
    # A fork server: a plain fork copies the locks of torch's threads, a spawn imports everything once a worker.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([getattr(function, "func", function).__module__])  # a partial's own is functools
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context) as pool:
        return list(report(pool.map(function, tasks)))


def _shown(results: Iterable[Result], *, label: str, unit: str, sizes: Sequence[int]) -> Iterator[Result]:
    console = Console(stderr=True)
    total, done, spoken = sum(sizes), 0, time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(label, total=total)
        for result, size in zip(results, sizes, strict=True):
            done += size
            progress.advance(bar, size)
            if not console.is_terminal and time.monotonic() - spoken > SECONDS_BETWEEN_LINES:
                spoken = time.monotonic()
                console.print(f"{label}: {done:,} of {total:,} {unit}")
            yield result
