"""CPU cores that this process may use."""

import os
from pathlib import Path

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # cgroup v2, as mounted inside a container


def available_cores() -> int:
    """Return the number of usable cores: taskset, Slurm and container limits can make it smaller than the machine's."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = CPU_QUOTA.read_text().split()  # microseconds of CPU per microseconds of time, or "max"
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
