"""A study on Snakemake: what runs, what does not run again, what a failure stops."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from data.shards.dataset import Dataset
from pipeline.runs.run import Run
from tests.support.commands import ran_steps, run_module
from tests.support.paths import ROOT

pytestmark = pytest.mark.engines

STUDY = """
data:
  digits: {pack: [source=digits], train: [data=digits]}
train:
  overrides: [+model=lenet, tracking=none, recipe.epochs=2, data.batch_size=256, +trainer.limit_train_batches=2]
  runs:
    good: []
    bad: [recipe.optimizer.lr=1e30]
evaluate: {val: [split=val]}
report: {}
export: {weights: [format=safetensors]}
compare: [mlflow=false]
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project's configs and code with the study `two`, and a folder `work` to run it in."""
    root = tmp_path_factory.mktemp("project")
    for name in ("conf", "pipeline", "models", "data"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(root)], check=True)
    for name in (".workflow", ".venv", "Makefile", "requirements.lock"):
        (root / name).symlink_to(ROOT / name)
    (root / "conf" / "study" / "two.yaml").write_text(STUDY)
    (root / "work").mkdir()
    return root


def workflow(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run_module(project / "work", "pipeline.workflow", "+study=two", *words, root=project)


def planned(project: Path, *words: str) -> dict[str, str]:
    """The steps that would run, and why."""
    answer = workflow(project, "dry_run=true", *words)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    *lines, last = answer.stdout.splitlines()
    assert last == f"{len(lines)} of 8 steps would run"
    return dict(line.split("  ") for line in lines)


GOOD = "study.train.runs.bad=[recipe.optimizer.lr=0.01]"


def test_a_failure_stops_only_what_needs_it_and_the_same_command_does_what_is_missing(project: Path) -> None:
    folder = project / "work" / "studies" / "two"
    assert set(planned(project).values()) >= {"not done yet", "not done yet; after train/good"}
    assert [path.name for path in folder.iterdir()] == [".lock"]
    answer = workflow(project)
    assert answer.returncode == 2, answer.stdout + answer.stderr
    assert ran_steps(answer) == ["evaluate/good/val", "export/good/weights", "pack/digits", "train/bad!", "train/good"]
    assert re.search(r"failed with exit code 2: error: step \d has a ", answer.stdout)
    assert f"({Path('studies/two/logs/train/bad.log')})" in answer.stdout
    assert re.search(r"bad +│ failed +│ +│\n", answer.stdout), "nothing of an evaluation"
    first = (folder / "runs" / "good" / "result.json").stat().st_mtime_ns
    assert ran_steps(workflow(project, "--", "train/good", "train/bad")) == ["train/bad!"]
    answer = workflow(project, GOOD)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert ran_steps(answer) == ["compare/all", "evaluate/bad/val", "export/bad/weights", "train/bad"]
    assert (folder / "runs" / "good" / "result.json").stat().st_mtime_ns == first
    numbers = json.loads((folder / "comparison" / "comparison.json").read_text())
    assert {run["name"] for run in numbers["runs"]} == {"good", "bad"}
    assert numbers["split"] == "val"
    for same in ((), ("profile.prefix.train={ env; } &&",), ("jobs=2",)):
        assert planned(project, GOOD, *same) == {}, same
    shutil.move(folder / "data", project / "hidden")
    assert planned(project, GOOD)["pack/digits"] == "not done yet"
    shutil.move(project / "hidden", folder / "data")
    assert planned(project, GOOD) == {}, "a dry run has changed what is done"


def test_mistakes_alone_are_exit_code_1_and_old_results_of_them_are_not_shown(project: Path) -> None:
    assert not planned(project, GOOD), "the study of the first test"
    mistake = "study.train.runs.bad=[data.batch_size=100000]"
    answer = workflow(project, mistake)
    assert answer.returncode == 1, answer.stdout + answer.stderr
    assert ran_steps(answer) == ["train/bad!"]
    assert "failed with exit code 1: error: 1438 training images are fewer than " in answer.stdout
    assert re.search(r"good +│ 0\.\d+ +│ 0\.\d+ +│\n", answer.stdout)
    assert re.search(r"bad +│ failed +│ +│\n", answer.stdout)
    assert workflow(project, GOOD).returncode == 0


def test_without_keep_going_the_first_failure_is_the_last_step(project: Path) -> None:
    words = ("out=stops", "study.train.overrides=[+model=lenet,tracking=none,data.batch_size=100000]")
    first = workflow(project, *words, "keep_going=false")
    assert first.returncode == 1, first.stdout + first.stderr
    assert len(ran_steps(first)) == 2, "the packing and one training"
    assert (project / "work" / "stops" / "study.yaml").is_file()
    assert ran_steps(workflow(project, *words)) == ["train/bad!", "train/good!"]


def test_a_plain_snakemake_does_the_same(project: Path) -> None:
    file = "studies/two/study.yaml"
    assert not planned(project, GOOD), "the study of the first test"
    words = [str(ROOT / ".workflow/bin/snakemake"), "-s", str(project / "pipeline/engines/Snakefile")]
    words += ["--configfile", file, "--cores", "1"]
    bare = [*words[:3], "--cores", "1"]
    answer = subprocess.run(bare, cwd=project / "work", capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert "no study: add --configfile studies/NAME/study.yaml" in answer.stderr
    answer = subprocess.run([*words, "--dry-run"], cwd=project / "work", capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "Nothing to be done" in answer.stdout + answer.stderr
    assert workflow(project, GOOD, "profile.prefix.train=env", "profile.prefix.evaluate=env").returncode == 0
    answer = subprocess.run([*words, "--dry-run"], cwd=project / "work", capture_output=True, text=True, check=False)
    assert "Nothing to be done" in answer.stdout + answer.stderr, "another prefix repeats nothing"
    assert workflow(project, GOOD, "graph=steps.dot").returncode == 0
    drawn = (project / "work" / "steps.dot").read_text()
    assert drawn.startswith("digraph")
    assert drawn.count("train") >= 2
    subprocess.run([*words, "--report", "report.html"], cwd=project / "work", capture_output=True, check=True)
    assert "Snakemake Report" in (project / "work" / "report.html").read_text()


def test_a_changed_value_reruns_what_depends_on_it_and_keeps_the_old_result(project: Path) -> None:
    runs = project / "work" / "studies" / "two" / "runs"
    seed = Run(runs / "good").fingerprint()["seed"]
    changed = (GOOD, "study.train.runs.good=[seed=7]")
    assert planned(project, *changed) == {
        "train/good": "its command has changed",
        "evaluate/good/val": "after train/good",
        "export/good/weights": "after train/good",
        "compare/all": "after evaluate/good/val, train/good",
    }
    assert planned(project, GOOD) == {}, "looking has changed nothing"
    answer = workflow(project, *changed)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    moved, current = Run(runs / "good-replaced-1"), Run(runs / "good")
    assert (moved.fingerprint()["seed"], current.fingerprint()["seed"]) == (seed, 7)
    assert moved.is_finished
    assert (moved.evaluation / "val" / "evaluation.json").is_file()
    evaluated = (*changed, "study.evaluate.val=[split=val,batch_size=32]")
    assert set(planned(project, *evaluated)) == {"evaluate/good/val", "evaluate/bad/val", "compare/all"}
    assert workflow(project, *evaluated).returncode == 0
    assert (runs / "good" / "evaluation" / "val-replaced-1" / "evaluation.json").is_file()
    (runs / "bad" / "evaluation" / "val" / "evaluation.json").unlink()
    assert planned(project, *evaluated) == {"evaluate/bad/val": "not done yet", "compare/all": "after evaluate/bad/val"}


PARTS = """
data:
  digits: {pack: [source=digits, shard_samples=200], parts: 3, train: [data=digits]}
train: {runs: {lenet: [+model=lenet, tracking=none, recipe.epochs=1, +trainer.limit_train_batches=1]}}
"""


def test_a_data_set_is_packed_in_parts(project: Path) -> None:
    (project / "conf" / "study" / "parts.yaml").write_text(PARTS)
    command = ("pipeline.workflow", "+study=parts", "jobs=2")
    first = run_module(project / "work", *command, "--", "studies/parts/done/pack/digits@1of3", root=project)
    assert ran_steps(first) == ["pack/digits@1of3"], first.stdout + first.stderr
    answer = run_module(project / "work", *command, root=project)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert ran_steps(answer) == ["pack/digits", "pack/digits@2of3", "pack/digits@3of3", "train/lenet"]
    folder = project / "work" / "studies" / "parts"
    manifest = json.loads((folder / "data" / "digits" / "dataset.json").read_text())
    assert len(manifest["splits"]["train"]["shards"]) == 8
    assert sorted(path.name for path in (folder / "logs" / "pack").iterdir()) == [
        "digits.log", "digits@1of3.log", "digits@2of3.log", "digits@3of3.log",
    ]  # fmt: skip
    assert "3/3: 3 tars" in (folder / "logs" / "pack" / "digits@3of3.log").read_text()
    assert not ran_steps(run_module(project / "work", *command, root=project))
    different = "study.data.digits.pack=[source=digits,shard_samples=300]"
    target = ("--", "studies/parts/done/pack/digits")
    changed = run_module(project / "work", *command, different, *target, root=project)
    assert changed.returncode == 0, changed.stdout + changed.stderr
    assert set(ran_steps(changed)) == {"pack/digits", *(f"pack/digits@{number}of3" for number in (1, 2, 3))}
    manifest = json.loads((folder / "data" / "digits" / "dataset.json").read_text())
    assert len(manifest["splits"]["train"]["shards"]) == 5
    assert (folder / "data" / "digits-replaced-1" / "dataset.json").is_file()
    missing = run_module(project / "work", *command, different, "dry_run=true", root=project)
    assert missing.stdout == "train/lenet  after pack/digits\n1 of 5 steps would run\n"


def test_a_changed_folder_of_tars_is_indexed_again(project: Path, photographs: Dataset) -> None:
    work = project / "work"
    for name in ("a", "b"):
        (work / name).mkdir()
    for number, tar in enumerate(sorted(photographs.root.glob("*.tar"))):
        for name in ("a", "b"):
            shutil.copy(tar, work / name / f"{tar.stem.split('-')[0]}-{name}{number}.tar")
    study = "{data: {tars: {root: a}}, train: {runs: {lenet: [+model=lenet, tracking=none]}}}"
    (project / "conf" / "study" / "tars.yaml").write_text(study)
    command = ("pipeline.workflow", "+study=tars")
    for root in ("a", "b"):
        answer = run_module(work, *command, f"study.data.tars.root={root}", "--", "--until", "index", root=project)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        assert ran_steps(answer) == ["index/tars"]
    folder = work / "studies" / "tars" / "data"
    assert "train-a" in (folder / "tars-replaced-1" / "dataset.json").read_text()
    assert "train-b" in (folder / "tars" / "dataset.json").read_text()


def test_a_study_cannot_change_the_commands_of_a_profile(project: Path) -> None:
    indented = STUDY.replace("\n", "\n  ")
    profile = "profile: {prefix: {train: touch ran;}}"
    evil = f"# @package _global_\n{profile}\nstudy:{indented}"
    file = project / "conf" / "study" / "evil.yaml"
    file.write_text(evil)
    answer = run_module(project / "work", "pipeline.workflow", "+study=evil", root=project)
    file.unlink()
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: the study changes the profile, which does not count")
    assert not (project / "work" / "ran").exists()


def test_an_engine_that_is_signalled_at_any_moment_ends(project: Path) -> None:
    """Snakemake's own handler waits for a lock that the interrupted code may hold."""
    command = [sys.executable, "-m", "pipeline.workflow", "+study=two", "name=signalled", "~study.train.runs.bad"]
    environment = {**os.environ, "PYTHONPATH": str(project)}
    folder, end = project / "work" / "studies" / "signalled", time.monotonic() + 60
    with subprocess.Popen(command, cwd=project / "work", env=environment) as process:
        while not (folder / "logs" / "train" / "good.log").exists() and time.monotonic() < end:
            time.sleep(0.01)
        (engine,) = psutil.Process(process.pid).children()
        end = time.monotonic() + 60
        with suppress(psutil.NoSuchProcess):
            while time.monotonic() < end:  # also while it registers the end of the training
                engine.terminate()
                time.sleep(0.0002)
        process.wait(20)
    log = (folder / "snakemake.log").read_text()
    assert "Will exit after finishing currently running jobs" in log
    assert "RecursionError" not in log, "handlers that wait for each other"
    assert (folder / "done" / "train" / "good").exists()
    assert not (folder / "done" / "evaluate").exists(), "no step began after the signals"
    assert workflow(project, "name=signalled", "~study.train.runs.bad").returncode == 0


@pytest.mark.parametrize(("to", "number", "code"), [("the command", 15, 143), ("the engine", 9, 2)])
def test_a_signal_stops_the_training_and_the_same_command_continues_it(
    project: Path, to: str, number: int, code: int
) -> None:
    name = f"long{number}"
    long = (f"name={name}", "study.train.runs.good=[recipe.epochs=40]", "~study.train.runs.bad", "~study.compare")
    command = [sys.executable, "-m", "pipeline.workflow", "+study=two", *long]
    run = Run(project / "work" / "studies" / name / "runs" / "good")
    environment = {**os.environ, "PYTHONPATH": str(project)}
    with subprocess.Popen(command, cwd=project / "work", env=environment) as process:
        end = time.monotonic() + 120
        while run.last_checkpoint is None and time.monotonic() < end:
            time.sleep(0.1)
        (engine,) = psutil.Process(process.pid).children()
        (engine if to == "the engine" else process).send_signal(number)
        assert process.wait(20) == code
    end = time.monotonic() + 20
    while run.is_locked and time.monotonic() < end:
        time.sleep(0.1)
    status = json.loads(run.status_file.read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 143)
    assert status["step"] > 0
    answer = workflow(project, *long)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert ran_steps(answer) == ["evaluate/good/val", "export/good/weights", "train/good"]
    log = (run.folder.parents[1] / "logs" / "train" / "good.log").read_text()
    assert "stopped: the same command continues after step" in log
    assert f"(continues after step {status['step']})" in log


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+study=toy"], "error: study=toy is not one of digits, "),
        (["study.train.runs.bad=[+model=resnet18]"], "error: train/bad: model=resnet18 is not one of "),
        (
            ["study.train.overrides=[+model=lenet,recipe.epochs=-1]"],
            "error: train/good: recipe.epochs=-1 must be an integer of at least 1",
        ),
        (
            ["study.data.digits.pack=[source=digits,val_fraction=2]"],
            "error: pack/digits: val_fraction=2 must be at least 0 and less than 1",
        ),
        (
            ["study.data.digits.pack=[source=folder,source.root=none]"],
            "error: pack/digits: source.root=none does not exist",
        ),
        (
            ["study.train.overrides=[+model=lenet,data.image_size=31]"],
            "error: train/good: data.image_size=31 must be 28 or 32 pixels for LeNet-5",
        ),
        (
            ["profile.prefix.train=torchrn --nproc-per-node=2"],
            "error: profile.prefix.train=torchrn --nproc-per-node=2: there is no program torchrn",
        ),
        (
            ["profile=kubernetes", "profile.image=a", "profile.claim=c", "profile.nodes=0", "dry_run=true"],
            "error: profile.nodes=0 must be at least 1",
        ),
        (
            ["profile=kubernetes", "profile.image=a", "profile.claim=c", "profile.kind=Job", "dry_run=true"],
            "error: argument profile.kind: invalid choice: 'Job' (choose from 'trainjob', 'jobset')\n",
        ),
        (["--", "train/goood"], "error: there is no step train/goood: did you mean train/good?"),
        (
            ["study.train.overrides=[+model=lenet,weights=missing.pt]"],
            "error: train/good: weights.file=missing.pt does not exist",
        ),
        (["study.evaluate.val=[split=tset]"], "error: evaluate/good/val: split=tset is not one of train, val, test"),
        (["study.export.weights=[format=onx]"], "error: export/good/weights: format=onx is not one of onnx, "),
        (["+study.report.all=[layers=every]"], "error: report/good/all: layers=every is not one of some, all, none"),
        (["graph=steps.pdf"], "error: graph=steps.pdf must end in one of .dot, .png, .svg"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_runs(project: Path, words: list[str], message: str) -> None:
    given = words if words[0].startswith("+study=") else ["+study=two", *words]  # before --
    answer = run_module(project / "work", "pipeline.workflow", "name=wrong", *given, root=project)
    assert answer.returncode == 1
    assert answer.stderr.startswith(message)
    assert answer.stderr.count("\n") == 1
    assert not [path for path in (project / "work").glob("studies/wrong/*") if path.name != ".lock"]
