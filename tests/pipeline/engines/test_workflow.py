"""A study on Snakemake: what runs, what does not run again, what a failure stops."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.runs.run import Run
from tests.support.commands import ran_steps
from tests.support.paths import ROOT
from tests.support.small_study import workflow

pytestmark = pytest.mark.engines


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
