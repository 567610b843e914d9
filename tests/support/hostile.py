"""Files and configs of a stranger: each leaves a marker if something in it runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from models.sequential import lenet
from pipeline.build.settings import RunSettings
from pipeline.cli import compose as composing
from pipeline.cli.errors import one_line_errors
from pipeline.cli.verb import Verb
from tests.support.commands import call_verb

MARKER = "ran"  # a file in the working folder
COMMAND = f"touch {MARKER}"
SECRET = "hunter2-correct-horse"


class Bomb:
    """An object whose pickle runs the command."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (COMMAND,)


class Notify(pl.Callback):
    """A callback that takes a secret."""

    def __init__(self, api_key: str) -> None:
        self.api_key = api_key


def copy_conf(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Copy `conf/` and compose from the copy, to which a stranger's files can be added."""
    copy = shutil.copytree(composing.CONF, folder / "conf")
    patch.setattr(composing, "CONF", copy)
    return copy


def write_run(folder: Path, *words: str) -> Path:
    """Write the folder of a finished training of LeNet on digits, with fresh weights."""
    config = composing.compose("train", ["+model=lenet", *words])
    settings = RunSettings(config, num_classes=10, weights_sha256=None)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(settings.record)
    (folder / "fingerprint.json").write_text(json.dumps({"precision": "32-true"}))
    (folder / "result.json").write_text("{}")
    state = {f"net.{name}": tensor for name, tensor in lenet(num_classes=10, image_size=32).state_dict().items()}
    torch.save({"state_dict": state, "global_step": 3}, folder / "checkpoints" / "last.ckpt")
    return folder


def answer_of(verb: Verb, main: Callable[[DictConfig], None], words: list[str]) -> None:
    """Run a verb in this process as its command does, with errors as one line on stderr."""
    with one_line_errors():
        call_verb(verb, main, words)


def texts_below(folder: Path) -> str:
    """Return the content of every file below a folder, databases included, as one text."""
    return "\n".join(path.read_bytes().decode(errors="replace") for path in folder.rglob("*") if path.is_file())


def assert_refused(run: Callable[[], Any], capsys: pytest.CaptureFixture[str], *, folder: Path) -> str:
    """Assert that a command ends with one sentence and exit code 1, and that nothing ran; return the sentence."""
    with pytest.raises(SystemExit) as end:
        run()
    printed = capsys.readouterr()
    assert end.value.code == 1, printed
    assert not (folder / MARKER).exists(), "it ran"
    (sentence,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in printed.err
    assert SECRET not in printed.out + printed.err
    assert len(sentence) < 700, sentence
    return sentence
