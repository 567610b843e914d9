"""The example in docs/ answers from a JPEG as `pipeline.predict` does, without Convoy and torch."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image, ImageOps

from pipeline import load
from tests.support.images import make_jpeg, orientation
from tests.support.paths import ROOT

EXAMPLE = ROOT / "docs" / "classify_onnx.py"
SIZES = [(8, 8), (32, 32), (33, 47), (64, 48), (100, 300), (375, 500), (517, 333), (700, 901), (31, 640), (1200, 1600)]


def cmyk_jpeg(*, seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(make_jpeg(90, 120, seed=seed))).convert("CMYK").save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def grey_jpeg(*, seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(make_jpeg(130, 70, seed=seed))).convert("L").save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """JPEGs of many sizes, turned by EXIF in all eight ways, grey, CMYK, and with coarse colours."""
    contents = [make_jpeg(*size, seed=number) for number, size in enumerate(SIZES)]
    contents += [make_jpeg(60, 90, seed=value, exif=orientation(value)) for value in range(1, 9)]
    contents += [grey_jpeg(seed=50), cmyk_jpeg(seed=51), make_jpeg(211, 157, seed=52, subsampling=2)]
    folder, paths = tmp_path_factory.mktemp("pictures"), []
    for number, content in enumerate(contents):
        paths.append(folder / f"{number:02}.jpg")
        paths[-1].write_bytes(content)
    return paths


def test_the_example_answers_as_predict_does(exported: Path, pictures: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, "-I", str(EXAMPLE), str(exported / "model.onnx"), *map(str, pictures)]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    rows = [line.split() for line in answer.stdout.splitlines()]
    assert [Path(row[0]) for row in rows] == pictures
    expected = load(exported.parent, device="cpu").predict(pictures)
    assert [one.error for one in expected] == [None] * len(pictures)
    assert [row[1] for row in rows] == [one.label for one in expected]
    probabilities = np.array([one.probabilities.numpy() for one in expected if one.probabilities is not None])
    assert probabilities.std(0).max() > 0.01, "answers that are all alike prove nothing"
    np.testing.assert_allclose(np.array([row[2:] for row in rows], float), probabilities, rtol=0, atol=1e-4)


def test_pillows_resize_would_not_do(exported: Path, pictures: list[Path]) -> None:
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    expected = load(exported.parent, device="cpu").predict(pictures[:10])
    differences = []
    for path, one in zip(pictures[:10], expected, strict=True):
        fitted = ImageOps.fit(Image.open(path).convert("RGB"), (32, 32), Image.Resampling.BILINEAR)
        (answers,) = session.run(None, {"images": np.asarray(fitted)[None]})
        assert one.probabilities is not None
        differences.append(np.abs(answers[0] - one.probabilities.numpy()).max())
    assert sum(difference > 1e-4 for difference in differences) > 5


def test_the_example_is_short_and_needs_three_libraries() -> None:
    text = EXAMPLE.read_text()
    assert text.count("\n") <= 30
    nodes = list(ast.walk(ast.parse(text)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert names == {"json", "sys", "numpy", "onnxruntime", "PIL"}
