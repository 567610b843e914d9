"""Jobs on a Slurm of two nodes that this machine plays; it is started and ended here."""

from __future__ import annotations

import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from pipeline.runs.run import Run
from tests.support.commands import ran_steps, run_module
from tests.support.digits_study import FAMILIES, STUDY, compared, steps_of, without_others
from tests.support.images import make_folder
from tests.support.paths import ROOT

pytestmark = [pytest.mark.engines, pytest.mark.usefixtures("slurm")]

SCRIPT = "pipeline/engines/slurm/train.sbatch"
TRAIN = (*("+model=lenet", "data=digits", "tracking=none", "recipe.epochs=20", "data.batch_size=16", "log_every=1000"),)
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", SCRIPT, *TRAIN)
SECONDS = 120.0
SOON = ("--slurm-init-seconds-before-status-checks=1", "--seconds-between-status-checks=1")
SMALL = ("--slurm-status-command=squeue", "--default-resources", "mem_mb=1900", "runtime=10")
ON_SLURM = ("profile=slurm", "~profile.resources", "+profile.resources={}", "--", *SOON, *SMALL)


def command(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def until(condition: Callable[[], object], event: str) -> None:
    """Wait for an event. Raises: AssertionError, with the state of all jobs, when it has not come in SECONDS."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, f"{event} has not come: {command('scontrol', 'show', 'job')}"
        time.sleep(0.1)


class Job:
    """A job of `train.sbatch`, submitted with the words after `sbatch`, with its log."""

    def __init__(self, clone: Path, *words: str, name: str) -> None:
        submit = ["sbatch", "--parsable", *words, f"name={name}"]
        answer = subprocess.run(submit, cwd=clone, check=True, capture_output=True, text=True)
        self.number = answer.stdout.strip()
        self.log, self.run = clone / f"convoy-{self.number}.log", Run(clone / "runs" / name)

    @property
    def state(self) -> str:
        """Such as COMPLETED."""
        return re.findall(r"JobState=(\w+)", command("scontrol", "show", "job", self.number))[0]

    def text(self) -> str:
        """The log so far."""
        return self.log.read_text() if self.log.exists() else ""

    def await_epoch(self, start: int) -> None:
        """Wait until the start of this number has ended an epoch."""
        until(lambda: "\nepoch " in self.text().partition(f"start {start}\n")[2], f"an epoch in start {start}")


@pytest.fixture(autouse=True)
def no_jobs() -> Iterator[None]:
    """Leave no job to the next test."""
    yield
    command("scancel", "--me")


def test_a_study_of_every_family(clone: Path) -> None:
    words = (*STUDY, *without_others(FAMILIES), "+study.data.digits.parts=2", "name=slurm", *ON_SLURM)
    answer = run_module(clone, "pipeline.workflow", *words, root=clone)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert sorted(ran_steps(answer)) == sorted({*steps_of(FAMILIES), "pack/digits@1of2", "pack/digits@2of2"})
    assert compared(clone / "studies" / "slurm") == set(FAMILIES)


def test_a_mistake_in_a_study_is_made_once_and_shown_in_its_own_words(clone: Path) -> None:
    others = without_others(["lenet"])
    mistake = "study.train.overrides=[tracking=none,data.batch_size=100000]"
    words = (*STUDY, mistake, *others, "~study.evaluate", "~study.compare", "name=mistake", *ON_SLURM)
    answer = run_module(clone, "pipeline.workflow", *words, root=clone)
    assert answer.returncode == 1, answer.stdout + answer.stderr
    error = r"error: \d+ training images are fewer than "
    assert re.search(f"failed with exit code 1: {error}", answer.stdout), answer.stdout
    log = clone / "studies" / "mistake" / "logs" / "train" / "lenet.log"
    assert len(re.findall(error, log.read_text())) == 1


def test_a_training_of_two_nodes_survives_everything_to_the_same_bits(slurm: Path, clone: Path) -> None:
    undisturbed = Job(clone, *TWO_NODES, name="undisturbed")
    until(lambda: undisturbed.state != "RUNNING" and undisturbed.text(), "the end of the training")
    assert undisturbed.state == "COMPLETED", undisturbed.text()
    assert "batch       2 x 16 on CPU" in undisturbed.text()
    assert "\U0001f4a1" not in undisturbed.text(), "Lightning's advertisement"

    job = Job(clone, *TWO_NODES, name="disturbed")
    disturbances = [
        lambda: command("scancel", "--batch", "--signal=USR1", job.number),  # as Slurm before the time limit
        preempt,
        lambda: (forget_user_signal(slurm), preempt()),
        lambda: command("scontrol", "requeue", job.number),
        lambda: stop_node(slurm, "n2"),
    ]
    for start, disturb in enumerate(disturbances, start=1):
        job.await_epoch(start)
        disturb()
    job.await_epoch(len(disturbances) + 1)
    until(lambda: job.state == "COMPLETED", "the end of the disturbed training")
    assert job.text().count("epoch 20/20") == 1
    digests = [one.result()["checkpoint_sha256"] for one in (undisturbed.run, job.run)]
    assert digests[0] == digests[1]


def test_the_commands_of_the_documentation_train_on_two_nodes(clone: Path) -> None:
    make_folder(clone / "photos", images=20)
    block = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)[0]
    assert block in (ROOT / "README.md").read_text()
    install, pack, submit = block.splitlines()
    assert install == "make install"
    subprocess.run(shlex.split(pack), cwd=clone, check=True, capture_output=True)
    words = re.sub(r"(ntasks-per-node|gpus-per-node|cpus-per-task)=8", r"\1=1", submit).split()[1:]
    job = Job(clone, *words, "data.image_size=32", "data.batch_size=5", "recipe.epochs=1", "tracking=none", name="pets")
    until(lambda: job.state not in ("PENDING", "RUNNING"), "the end of the training")
    assert job.state == "COMPLETED", job.text()
    assert "batch       2 x 5 on CPU" in job.text()


def test_an_array_job_packs_in_parts(clone: Path) -> None:
    make_folder(clone / "many", images=40)
    (block,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "scale.md").read_text(), re.DOTALL)
    smaller = {"1-16": "1-3", "/16": "/3", "=16": "=1", "photos": "many", "name=many": "name=many shard_samples=20"}
    for old, new in smaller.items():
        assert old in block
        block = block.replace(old, new)
    array, merge = block.splitlines()
    command("bash", "-c", f"cd {clone} && {array.replace('sbatch', 'sbatch --wait')}")
    partial = clone / "datasets" / ".many.partial"
    assert len(list(partial.glob("*.tar"))) == 7
    printed = command("bash", "-c", f"cd {clone} && {merge}")
    assert "train 96 (tars: 5), val 24 (tars: 2)" in printed
    assert not partial.exists()


def test_a_time_limit_continues_a_job_and_scancel_ends_it(clone: Path) -> None:
    job = Job(clone, "--time=1", *TWO_NODES, "recipe.epochs=1000", name="limited")
    stopped = "stopped: the same command continues after step "
    until(lambda: stopped in job.text(), "a stop by the time limit")  # which may first come before a step
    command("scontrol", "update", f"JobId={job.number}", "TimeLimit=UNLIMITED")
    step = int(re.findall(rf"{stopped}(\d+)", job.text())[0])
    until(lambda: f"(continues after step {step})" in job.text(), "its next start")
    until(lambda: "\nepoch " in job.text().partition(f"(continues after step {step})")[2], "an epoch")
    command("scancel", job.number)
    until(lambda: job.state == "CANCELLED", "the end of the job")
    until(lambda: job.text().count(stopped) == 2, "the save")


@pytest.mark.parametrize(
    ("word", "message", "code"),
    [
        ("trainer=cpu", "error: 2 ranks were started, but trainer.devices=1", 1),
        ("recipe.optimizer.lr=1e30", "error: step ", 2),
    ],
)
def test_a_mistake_and_a_failure_end_the_job(clone: Path, word: str, message: str, code: int) -> None:
    job = Job(clone, *TWO_NODES, word, name=f"wrong{code}")
    until(lambda: job.state == "FAILED", "the end of the job")
    assert message in job.text()
    assert f"ExitCode={code}:0" in command("scontrol", "show", "job", job.number)


def preempt() -> None:
    """Let a job of a higher priority take both nodes for a moment."""
    command("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


def forget_user_signal(slurm: Path) -> None:
    """Let Slurm send no SIGUSR1 before a preemption."""
    file = slurm / "slurm.conf"
    line = "SlurmctldParameters=preempt_send_user_signal\n"
    assert line in file.read_text()
    file.write_text(file.read_text().replace(line, ""))
    command("scontrol", "reconfigure")


def stop_node(slurm: Path, node: str) -> None:
    """Kill Slurm's daemon on a node and all that it has started; start it again once Slurm has noticed."""
    psutil.Process(int((slurm / f"slurmd.{node}.pid").read_text())).kill()
    for one in psutil.process_iter():
        with suppress(psutil.Error):
            if one.environ().get("SLURMD_NODENAME") == node:
                parent = one.parent()
                if parent is not None and "slurmstepd" in " ".join(parent.cmdline()):
                    parent.kill()
                one.kill()
    until(lambda: "DOWN" in command("scontrol", "show", "node", node), "the failure of the node")
    subprocess.run(["slurmd", "-f", str(slurm / "slurm.conf"), "-N", node], check=True)
