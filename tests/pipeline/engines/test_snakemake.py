"""The engine's schedulers."""

from __future__ import annotations

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


def test_steps_on_this_machine_need_no_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    snakemake.check_scheduler(None)
