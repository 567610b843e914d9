"""A finished LeNet with a temperature, and its export in every format and precision."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.export import __main__ as export_verb
from pipeline.runs.calibration import Calibration, digest
from tests.support.commands import Typed, call_verb, typed

TEMPERATURE = 0.2  # sharpens the answers of a network that has hardly been trained


@pytest.fixture(scope="session")
def fitted_root(tmp_path_factory: pytest.TempPathFactory, lenet_root: Path) -> Path:
    """A folder with the digits and with the run `fitted`."""
    root = tmp_path_factory.mktemp("fitted")
    run = shutil.copytree(lenet_root / "runs" / "mine", root / "runs" / "fitted")
    (root / "datasets").symlink_to(lenet_root / "datasets")
    weights_sha256 = digest(run / "checkpoints" / "best.ckpt")
    Calibration(TEMPERATURE).save(run / "evaluation" / "calibration.json", weights_sha256=weights_sha256)
    return root


@pytest.fixture(scope="session")
def exported(fitted_root: Path) -> Path:
    """`python -m pipeline.export run=fitted` with all formats and precisions: the folder of the files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(fitted_root)
        call_verb(export_verb.VERB, export_verb.main, ["run=fitted", "precision=[float32,float16,bfloat16]"])
    return fitted_root / "runs" / "fitted" / "export"


@pytest.fixture
def export(fitted_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Run `python -m pipeline.export ...` beside the run `fitted`."""
    monkeypatch.chdir(fitted_root)
    return typed(export_verb.VERB, export_verb.main, capsys)
