"""The registry gets a model that MLflow itself loads and serves."""

from __future__ import annotations

from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from pipeline import load
from tests.support.commands import Typed
from tests.support.serving import served_answers

NAME = "digits"


@pytest.fixture
def registered(export: Typed, fitted_root: Path) -> str:
    """The store's URI, after `register=digits`."""
    uri = f"sqlite:///{fitted_root / 'mlflow.db'}"
    printed = export("run=fitted", "format=onnx", f"register={NAME}", f"tracking.uri={uri}", "out=registered")
    assert f"registered as {NAME} version " in printed
    return uri


def crops(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def test_mlflow_loads_and_serves_the_registered_model(
    registered: str, fitted_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(registered, registered)
    version = client.get_model_version_by_alias(NAME, "champion")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registered)
    mlflow.set_tracking_uri(registered)
    mlflow.set_registry_uri(registered)
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    signature = model.metadata.signature
    (given,), (returned,) = signature.inputs.to_dict(), signature.outputs.to_dict()
    assert given["tensor-spec"] == {"dtype": "uint8", "shape": (-1, 32, 32, 3)}
    assert returned["tensor-spec"] == {"dtype": "float32", "shape": (-1, 10)}
    assert (given["name"], returned["name"]) == ("images", "probabilities")
    expected = load(fitted_root / "runs" / "fitted", device="cpu")(torch.from_numpy(crops(3))).numpy()
    np.testing.assert_allclose(model.predict(crops(3))["probabilities"], expected, atol=1e-5)
    example = model.input_example
    assert np.asarray(example["images"]).shape == (2, 32, 32, 3)
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{NAME}@champion"))
    names = [line.partition("=")[0] for line in (folder / "requirements.txt").read_text().splitlines()]
    assert set(names) == {"mlflow", "onnx", "onnxruntime", "numpy"}
    assert int(version.version) >= 1
    answers = served_answers(registered, NAME, crops(3))
    np.testing.assert_allclose(answers["predictions"]["probabilities"], expected, atol=1e-5)


def test_another_export_is_the_next_version(registered: str, export: Typed, fitted_root: Path) -> None:
    before = MlflowClient(registered, registered).get_model_version_by_alias(NAME, "champion")
    words = ("run=fitted", "format=onnx", f"register={NAME}", f"tracking.uri={registered}", "out=registered")
    assert f"version {int(before.version) + 1}" in export(*words, "alias=challenger")
    client = MlflowClient(registered, registered)
    assert client.get_model_version_by_alias(NAME, "champion").version == before.version
    assert client.get_model_version_by_alias(NAME, "challenger").version == before.version + 1
    assert f", challenger moved there from version {int(before.version) + 1}" in export(*words, "alias=challenger")
    assert "moved" not in export(*words, "alias=none")


def test_a_registry_that_is_away_is_one_sentence(
    export: Typed, fitted_root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = "http://127.0.0.1:9"
    words = ("run=fitted", "format=onnx", f"register={NAME}", f"tracking.uri={away}", "out=away")
    with pytest.raises(SystemExit) as ended:
        export(*words)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: register={NAME}: {away} does not accept the model: ")
    assert (fitted_root / "away" / "model.onnx").is_file()


def test_a_refused_name_is_one_sentence(export: Typed, fitted_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"sqlite:///{fitted_root / 'mlflow.db'}"
    with pytest.raises(SystemExit) as ended:
        export("run=fitted", "format=onnx", "register=a/b", f"tracking.uri={uri}", "out=refused")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: register=a/b: ")
