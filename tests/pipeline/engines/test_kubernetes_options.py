"""Options of a job of Kubernetes: every mistake is found before anything is written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.cli.errors import ConfigError
from pipeline.engines.kubernetes.options import read_options
from tests.support.commands import run_module

OPTIONS = ("--image=a/b:1", "--claim=c")
TRAIN = ("pipeline.train", "+model=lenet")
WORDS = (*OPTIONS, "--", "python", "-m", *TRAIN)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--image=a/b:1", "--", "python", "-m", *TRAIN),
            "the following arguments are required: --claim: see python -m",
        ),
        (
            (*OPTIONS, "--", "python", "-m", "pipeline.cli"),
            "after -- must follow python -m pipeline.VERB, not python -m",
        ),
        ((*OPTIONS, "--", "python", "-m", "pipeline.train", "+model=lent"), "model=lent is not one of alexnet, "),
        ((*WORDS, "seed=0,1", "-m"), "kubectl is not installed: --print shows the manifest"),
        ((*OPTIONS, "python", "-m", *TRAIN), "-- is missing before the command, as in --image=IMAGE"),
        (WORDS, "kubectl is not installed: --print shows the manifest"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_written(
    tmp_path: Path, words: Sequence[str], message: str
) -> None:
    answer = run_module(tmp_path, "pipeline.engines.kubernetes", *words, PATH=str(tmp_path))
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr.startswith(f"error: {message}")
    assert answer.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--memory=lots", "must be a size such as 64Gi"),
        ("--memory=0Gi", "must be a size such as 64Gi"),
        ("--shared-memory=65Gi", "is more than --memory=64Gi"),
        ("--shared-memory=69G", "is more than --memory=64Gi"),
        ("--claim=Bad_Claim", "must be lower-case letters and digits, with dashes and dots between"),
        ("--claim=a..b", "must be lower-case letters and digits"),
        ("--claim=", "is empty or has spaces"),
        ("--namespace=a.b", "must be lower-case letters and digits, with dashes between"),
        ("--secret=-a", "must be lower-case letters and digits"),
        ("--poll-seconds=nan", "must be a number above 0"),
        ("--silent-seconds=-5.0", "must be a number above 0"),
        ("--gpus=-2", "must be at least 0"),
        ("--mount=/elsewhere", "does not hold the working directory /data"),
    ],
)
def test_values_that_no_object_of_kubernetes_can_have_are_refused(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{word} {message}")):
        read_options([*OPTIONS, word], folder=Path("/data"))


def test_values_of_kubernetes_are_accepted() -> None:
    given = {"memory": "64.5G", "shared_memory": ".5e11", "claim": "a.b-c", "namespace": "team-1", "secret": "s3"}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    options, settings = read_options([*OPTIONS, *words], folder=Path("/data"))
    assert {name: getattr(options, name) for name in given} == given
    assert (settings.memory, settings.claim, settings.folder) == ("64.5G", "a.b-c", Path("/data"))
