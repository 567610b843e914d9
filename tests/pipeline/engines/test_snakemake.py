"""The engine's schedulers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pipeline.engines import snakemake


@pytest.mark.parametrize(("scheduler", "program"), [("slurm", "sinfo"), ("kubernetes", "kubectl")])
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "No such file or directory"),
        ("echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1", "Unable to contact slurm"),
        ("exec sleep 60", r"timed out after 1\.0 seconds"),
    ],
)
def test_a_scheduler_that_does_not_answer_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, scheduler: str, program: str, script: str | None, reason: str
) -> None:
    if script is not None:
        (tmp_path / program).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if script else str(tmp_path))
    monkeypatch.setattr(snakemake, "SCHEDULER_SECONDS", 1.0)
    sentence = rf"^profile={scheduler}: {program} fails \(.*{reason}.*\): profile=local runs the steps on"
    with pytest.raises(OSError, match=sentence):
        snakemake.check_scheduler(scheduler)


def test_a_study_is_run_by_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine that inherits the lock keeps it, when the command has ended."""
    monkeypatch.setattr(snakemake, "LOCK_SECONDS", 0.3)
    with snakemake.locked(tmp_path / "study") as lock:
        engine = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
    with pytest.raises(ValueError, match="study is run by another process"), snakemake.locked(tmp_path / "study"):
        pass
    engine.kill()
    engine.wait()
    with snakemake.locked(tmp_path / "study"):
        pass


def test_steps_on_this_machine_need_no_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    snakemake.check_scheduler(None)
