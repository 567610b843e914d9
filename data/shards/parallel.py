"""Run a function over many tasks in several processes, with a progress bar on a terminal, progress lines elsewhere."""

import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Task = TypeVar("Task")
Result = TypeVar("Result")

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


def map_tasks(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    workers: int,
    label: str,
    unit: str = "shards",
    sizes: Sequence[int] | None = None,
) -> list[Result]:
    """Apply `function` to each task in `workers` processes, in order; progress counts `sizes` (default 1) in `unit`."""
    show = partial(_show_progress, label=label, unit=unit, sizes=sizes or [1] * len(tasks))
    if workers <= 1 or len(tasks) <= 1:
        return list(show(map(function, tasks)))
    # forkserver: fork would copy the locks of torch's threads, spawn would import everything once per worker.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([getattr(function, "func", function).__module__])  # .func: that of a partial
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context) as pool:
        return list(show(pool.map(function, tasks)))


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
