"""A mistake is one sentence, before anything is written."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from pipeline.export import settings
from tests.support.commands import Typed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run=nothing",), "run=nothing is not one of the 1 runs in runs"),
        (("run=fitted", "format=onx"), "format=onx is not one of onnx, pt2, safetensors, all: did you mean onnx?"),
        (("run=fitted", "format=[]"), "format=[] names nothing: give one of onnx, pt2, safetensors, all"),
        (("run=fitted", "precision=[float32,float8]"), "precision=float8 is not one of float32, float16, bfloat16"),
        (("run=fitted", "opset=9"), "opset=9 must be an integer of at least 18"),
        (("run=fitted", "format=onnx", "names=timm"), "names=timm is for tensors: add format=safetensors"),
        (("run=fitted", "format=pt2", "register=x"), "register=x needs the ONNX file: add format=onnx"),
        (("run=fitted", "format=onnx", "register=x", "tracking=none"), "register=x needs tracking=mlflow"),
        (("run=fitted", "format=safetensors", "names=timm"), "names=timm: timm has no network lenet5"),
        (("run=fitted", "image_size=40"), "image_size=40 does not suit lenet5, built for 32 pixels: "),
        (("run=fitted", "input=nowhere"), "input=nowhere does not exist"),
        (("run=fitted", "format=onnx", "opset=99"), "opset=99: torch wrote 18 instead: give opset=18"),
    ],
)
def test_a_mistake_is_one_sentence(export: Typed, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises((ValueError, OSError)) as raised:
        export(*words, f"out={tmp_path / 'out'}")
    (line,) = str(raised.value).splitlines()
    assert line.startswith(message)
    assert not (tmp_path / "out" / "export.json").exists()


def test_a_missing_library_is_named(export: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(settings, "find_spec", lambda name: None if name == "onnxscript" else there(name))
    with pytest.raises(ValueError, match=r"^format=onnx needs the package onnxscript: pip install onnxscript$"):
        export("run=fitted", "format=onnx")


def test_a_run_without_a_checkpoint_is_refused(export: Typed, fitted_root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(fitted_root / "runs" / "fitted", tmp_path / "early")
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(FileNotFoundError, match="has finished, and its checkpoints are gone: remove "):
        export(f"run={folder}")
    (folder / "result.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        export(f"run={folder}")


def test_a_target_from_elsewhere_needs_trust(export: Typed, fitted_root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(fitted_root / "runs" / "fitted", tmp_path / "foreign")
    config = folder / "config.yaml"
    text = config.read_text().partition("\n")[2]  # without the digest
    assert "models.sequential.lenet" in text
    config.write_text(text.replace("models.sequential.lenet", "os.system"))
    with pytest.raises(ValueError, match=r"model\._target_=os\.system is outside .*: add trust=true"):
        export(f"run={folder}")


def test_a_failure_leaves_nothing_new(export: Typed, tmp_path: Path) -> None:
    (tmp_path / "out" / "model.onnx").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"out/model\.onnx is a folder: remove it, or add out=FOLDER$"):
        export("run=fitted", f"out={tmp_path / 'out'}")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.onnx"]
    with pytest.raises(SystemExit):
        export(
            "run=fitted", f"out={tmp_path / 'new'}", "tolerance.float32=0", "precision=float16", "tolerance.float16=0"
        )
    assert not (tmp_path / "new").exists()


def test_other_weights_and_changed_data_leave_the_best_alone(export: Typed, fitted_root: Path, tmp_path: Path) -> None:
    run = shutil.copytree(fitted_root / "runs" / "fitted", tmp_path / "copied", ignore=shutil.ignore_patterns("export"))
    export(f"run={run / 'checkpoints' / 'last.ckpt'}", "format=safetensors", "compare_images=2")
    assert (run / "export" / "last" / "model.json").is_file()
    assert not (run / "export" / "model.json").exists()
    record = run / "fingerprint.json"
    record.write_text(record.read_text().replace('"digest of val": "', '"digest of val": "0'))
    printed = export(f"run={run}", "format=safetensors", "precision=float16")
    assert "of scikit-learn's photographs" in printed
    assert "top-1" not in printed
