"""What an evaluation has fitted is used with the weights for which it was fitted."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.runs.calibration import Calibration, read_calibration


def test_a_calibration_belongs_to_its_weights(tmp_path: Path) -> None:
    file = tmp_path / "evaluation" / "calibration.json"
    assert read_calibration(file, weights_sha256="one") == Calibration(1.0, None, None)
    fitted = Calibration(1.7, 0.8, 0.99)
    fitted.save(file, weights_sha256="one")
    assert read_calibration(file, weights_sha256="one") == fitted
    assert read_calibration(file, weights_sha256="other") == Calibration()


def test_answers_below_the_threshold_are_unsure() -> None:
    assert [Calibration(threshold=0.8).is_unsure(value) for value in (0.79, 0.8, 0.9)] == [True, False, False]
    assert not Calibration().is_unsure(0.1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weights_sha256": "", "temperature": -1}',
        '{"heat": 1}',
        '{"weights_sha256": "one", "temperature": Infinity}',
        '{"weights_sha256": "one", "threshold": 5}',
        '{"weights_sha256": "one", "threshold": "0.5"}',
        "[" * 100_000,
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"calibration.json .*: remove it, and evaluate the run again"):
        read_calibration(file, weights_sha256="one")
