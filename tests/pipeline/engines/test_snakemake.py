"""The engine's schedulers."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pipeline.cli.compose import compose
from pipeline.cli.errors import ConfigError, FailureError
from pipeline.engines import profile, snakemake
from pipeline.engines.study import Step
from pipeline.engines.table import describe_end


@pytest.mark.parametrize(("scheduler", "program"), [("slurm", "sinfo"), ("kubernetes", "kubectl")])
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1", "Unable to contact slurm"),
        ("exec sleep 60", r"timed out after 1\.0 seconds"),
    ],
)
def test_a_scheduler_that_does_not_answer_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, scheduler: str, program: str, script: str, reason: str
) -> None:
    (tmp_path / program).write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(profile, "SCHEDULER_SECONDS", 1.0)
    with pytest.raises(FailureError, match=rf"^{scheduler} does not answer: {program}: .*{reason}"):
        profile.check_scheduler(scheduler)


def test_a_scheduler_that_is_not_installed_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^sinfo is not installed: profile=local runs the steps on this machine"):
        profile.check_scheduler("slurm")


def profile_with(**changes: object) -> profile.Profile:
    values = OmegaConf.to_container(compose("workflow", ["+study=digits"]).profile)
    assert isinstance(values, dict)
    return profile.read_profile({**values, **changes}, jobs=None)


@pytest.mark.parametrize(
    "words", ["module load cuda && srun", "OMP_NUM_THREADS=2 nice", "$HOME/launch", "{ true; } &&"]
)
def test_words_before_a_command_may_be_code_for_bash(words: str) -> None:
    assert profile_with(prefix={"train": words}).prefix == {"train": words}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefix": {"train": "env 'x"}}, "profile.prefix.train=env 'x is no command for bash: unexpected EOF while"),
        ({"prefix": "srun"}, "profile.prefix=srun must be a group of keys"),
        ({"prefix": {"train": ["srun"]}}, "profile.prefix.train=['srun'] must be a text"),
        ({"scheduler": "slrum"}, "profile.scheduler=slrum is not one of slurm, kubernetes: did you mean slurm?"),
        ({"jobs": 0}, "jobs=0 must be an integer of at least 1"),
        ({"jobs": True}, "jobs=True must be an integer of at least 1"),
        ({"resources": {"trian": {}}}, "profile.resources.trian: a study has no steps of trian: did you mean train?"),
        ({"resources": {"train": 5}}, "profile.resources.train=5 must be a group of keys"),
        ({"resources": {"train": {"runtime": -5}}}, "profile.resources.train.runtime=-5 must be an integer of at"),
        ({"resources": {"train": {"gres": ["gpu"]}}}, "profile.resources.train.gres=['gpu'] must be a number or a"),
        ({"resources": {"train": {"nodes": 2, "tasks": 3}}}, "profile.resources.train.tasks=3 is not a multiple of"),
    ],
)
def test_values_of_a_profile_that_no_study_can_use_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        profile_with(**changes)


def test_resources_of_a_profile_are_accepted() -> None:
    resources = {"train": {"nodes": 2, "tasks": 16, "gres": "gpu:8", "slurm_account": None}, "pack": {"nodes": 2}}
    expected = {"train": {"nodes": 2, "tasks": 16, "gres": "gpu:8"}, "pack": {"nodes": 2}}
    assert profile_with(resources=resources).resources == expected


def test_a_program_before_a_command_must_be_on_this_machine_that_runs_it() -> None:
    with pytest.raises(ConfigError, match=r"^profile\.prefix\.train=torchrn --nnodes=2: there is no program torchrn"):
        profile_with(prefix={"train": "torchrn --nnodes=2"})
    assert profile_with(prefix={"train": "torchrn"}, executor="slurm").prefix == {"train": "torchrn"}


def test_a_study_is_run_by_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine that inherits the lock keeps it, when the command has ended."""
    monkeypatch.setattr(snakemake, "LOCK_SECONDS", 0.3)
    with snakemake.locked(tmp_path / "study") as lock:
        engine = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
    with (
        pytest.raises(ValueError, match=r"study is run by pipeline\.workflow, process "),
        snakemake.locked(tmp_path / "study"),
    ):
        pass
    engine.kill()
    engine.wait()
    with snakemake.locked(tmp_path / "study"):
        pass


def test_a_study_that_is_run_names_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snakemake, "LOCK_SECONDS", 0.3)
    with snakemake.locked(tmp_path) as lock:
        assert not list(snakemake.run(["true"], [], folder=tmp_path, lock=lock))
        message = rf"is run by Snakemake, process \d+ on {socket.gethostname()}: wait until "
        with pytest.raises(ValueError, match=message), snakemake.locked(tmp_path):
            pass
    message = rf"is run by pipeline\.workflow, process {os.getpid()} on "
    with snakemake.locked(tmp_path), pytest.raises(ValueError, match=message), snakemake.locked(tmp_path):
        pass


def test_an_engine_with_a_killed_step_is_a_failure(tmp_path: Path) -> None:
    ends = {"WorkflowError:\nAt least one job did not complete successfully.": FailureError, "OtherError: x": OSError}
    for text, kind in ends.items():
        with snakemake.locked(tmp_path) as lock, pytest.raises(kind):
            list(snakemake.run(["sh", "-c", f"echo '{text}'; exit 1"], [], folder=tmp_path, lock=lock))


def test_another_number_of_parts_makes_all_parts_again(tmp_path: Path) -> None:
    done = tmp_path / "done" / "pack"
    done.mkdir(parents=True)
    for name in ("a", "a@1of2", "a@2of2", "b@1of2", "b@2of2", "left", "left@1of3"):
        (done / name).touch()
    names = ("a", "a@1of3", "a@2of3", "a@3of3", "b", "b@1of2", "b@2of2")
    snakemake.forget_other_parts([Step("pack", name, (), (), tmp_path) for name in names], tmp_path)
    assert {path.name for path in done.iterdir()} == {"a", "b@1of2", "b@2of2", "left", "left@1of3"}


def test_a_step_is_current_after_its_command_and_all_that_it_needs(tmp_path: Path) -> None:
    needs = {"a": (), "b": ("train/a",), "c": ("train/b",), "d": ()}
    steps = [Step("train", name, (), need, tmp_path) for name, need in needs.items()]
    commands, done = tmp_path / "steps" / "train", tmp_path / "done" / "train"
    for folder in (commands, done):
        folder.mkdir(parents=True)
    for number, name in enumerate(needs):
        (commands / f"{name}.json").write_text(f"command\n{name}")
        (done / name).write_text(f"{number}\ncommand\n{name}")
        os.utime(done / name, (0, number))
    assert snakemake.find_current_steps(steps, tmp_path) == {"train/a", "train/b", "train/c", "train/d"}
    (done / "d").unlink()
    assert snakemake.find_current_steps(steps, tmp_path) == {"train/a", "train/b", "train/c"}
    (commands / "a.json").write_text("another")
    assert snakemake.find_current_steps(steps, tmp_path) == set()
    (commands / "a.json").write_text("command\na")  # as it was
    assert snakemake.find_current_steps(steps, tmp_path) == {"train/a", "train/b", "train/c"}
    os.utime(done / "a", (0, 5))  # after b
    assert snakemake.find_current_steps(steps, tmp_path) == {"train/a"}


def test_the_cause_of_a_killed_step_is_the_signal(tmp_path: Path) -> None:
    step = Step("train", "a", (), (), tmp_path)
    (tmp_path / "logs" / "train").mkdir(parents=True)
    (tmp_path / "logs" / "train" / "a.log").write_text("step 1/2  loss 0.1\n")
    line = describe_end(snakemake.Ended(step, 137, 5), tmp_path)
    assert "failed with exit code 137: killed by SIGKILL (the kernel does this when memory is full)" in line
    assert "exit code 143: step 1/2" in describe_end(snakemake.Ended(step, 143, 5), tmp_path)


def test_steps_on_this_machine_need_no_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    profile.check_scheduler(None)
