"""Which nvJPEG decodes, as nvImageCodec itself says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torchvision

from tests.support.paths import ROOT

PACKAGED = ".".join(metadata.version("nvidia-nvjpeg").split(".")[:3])
DECODE = """
from nvidia.dali import Pipeline, fn
with Pipeline(batch_size=1, num_threads=1, device_id=None) as pipeline:
    pipeline.set_outputs(fn.decoders.image(fn.external_source(source=lambda: [bytes(9)], batch=True), device="cpu"))
try:
    pipeline.run()
except RuntimeError:
    pass
from data.loading.nvjpeg import loaded_nvjpeg
print("ours", *loaded_nvjpeg())
"""


def decode_after(imports: str) -> tuple[str, str]:
    """The version of nvJPEG that nvImageCodec logs, and the one that `loaded_nvjpeg` gives."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DALI_NVIMGCODEC_LOG_LEVEL": "4"}
    command = [sys.executable, "-c", f"{imports}\n{DECODE}"]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    logged = re.search(r"nvJPEG version: ([0-9.]+)", answer.stdout + answer.stderr)
    ours = re.search(r"ours \((.+)\)", answer.stdout)
    assert logged is not None, answer.stderr
    assert ours is not None, answer.stdout
    return logged[1], ours[1].replace(", ", ".")


@pytest.mark.parametrize("imports", ["import pipeline.train.fit", "import benchmarks.loader"])
def test_the_packaged_nvjpeg_decodes_although_torchvision_brings_another(imports: str) -> None:
    assert decode_after(f"{imports}\nimport torchvision") == (PACKAGED, PACKAGED)


def test_a_library_that_came_first_is_known() -> None:
    logged, ours = decode_after("import torchvision")
    assert logged == ours


def test_a_process_is_given_the_library_of_the_one_that_starts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bundled,) = (Path(torchvision.__file__).parents[1] / "torchvision.libs").glob("libnvjpeg.*")
    copy = tmp_path / "an ümlaut and spaces" / bundled.name
    copy.parent.mkdir()
    shutil.copy(bundled, copy)
    monkeypatch.setenv("CONVOY_NVJPEG", str(copy))
    logged, ours = decode_after("import data.loading")
    assert logged == ours != PACKAGED
