"""The cores of a process, by the rules of containers and of Slurm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data.shards import parallel
from data.shards.parallel import share_of_cores


@pytest.fixture
def sixteen_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine whose scheduler leaves 16 cores, without a quota and outside Slurm."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(parallel, "CPU_QUOTA", tmp_path / "cpu.max")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("sixteen_cores")
def test_ranks_on_a_machine_divide_its_cores() -> None:
    assert share_of_cores(1) == (16, "16 cores")
    assert share_of_cores(4) == (4, "16 cores for 4 ranks")
    assert share_of_cores(32).cores == 1


@pytest.mark.usefixtures("sixteen_cores")
def test_a_quota_counts_where_it_is_smaller(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("600000 100000\n")
    assert share_of_cores(2) == (3, "6 cores for 2 ranks")


@pytest.mark.usefixtures("sixteen_cores")
def test_cores_that_slurm_has_divided_are_not_divided_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "4(x2)")
    monkeypatch.setenv("SLURM_CPU_BIND_TYPE", "mask_cpu:")
    assert share_of_cores(4) == (16, "16 cores (bound by Slurm)")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    assert share_of_cores(4) == (8, "8 cores (SLURM_CPUS_PER_TASK=8)")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1")  # one task, in which torchrun starts the ranks
    assert share_of_cores(4) == (2, "8 cores for 4 ranks (SLURM_CPUS_PER_TASK=8)")
    monkeypatch.setenv("SLURM_CPU_BIND_TYPE", "none")
    monkeypatch.delenv("SLURM_PROCID")  # a batch script without srun: torchrun starts the ranks
    assert share_of_cores(4) == (4, "16 cores for 4 ranks")
