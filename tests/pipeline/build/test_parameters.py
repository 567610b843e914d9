"""What the folder of a run, or a file beside its weights, says about classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.build.parameters import recorded_classes, with_digest

CONFIG = "model: {}\ndata: {}\n"
NAMES = "dataset: {classes: [cat, '${dog}', 1]}\n"


@pytest.mark.parametrize(("config", "classes"), [(CONFIG + NAMES, ["cat", "${dog}", "1"]), (CONFIG, None)])
def test_a_checkpoint_has_the_classes_of_its_run(tmp_path: Path, config: str, classes: list[str] | None) -> None:
    (tmp_path / "config.yaml").write_text(with_digest(config))
    assert recorded_classes(tmp_path / "checkpoints" / "best.ckpt") == classes
    assert recorded_classes(tmp_path / "copies" / "best.ckpt") is None


def test_a_damaged_record_of_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(with_digest(CONFIG + NAMES).replace("cat", "cow"))
    with pytest.raises(ValueError, match=r"config\.yaml has changed since it was written"):
        recorded_classes(tmp_path / "checkpoints" / "best.ckpt")


@pytest.mark.parametrize(
    ("beside", "classes"),
    [
        (json.dumps({"classes": ["cat", "dog"]}), ["cat", "dog"]),
        (json.dumps({"classes": 2}), None),
        (json.dumps([1]), None),
        ("{", None),
        (None, None),
    ],
)
def test_an_export_has_the_classes_of_the_file_beside_it(
    tmp_path: Path, beside: str | None, classes: list[str] | None
) -> None:
    if beside is not None:
        (tmp_path / "model.json").write_text(beside)
    assert recorded_classes(tmp_path / "model.safetensors") == classes
    assert recorded_classes(tmp_path / "model.pth") is None
