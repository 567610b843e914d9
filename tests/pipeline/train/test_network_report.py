"""The report that every training logs, beside the report verb's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.commands import FinishedRun, Typed


def test_a_training_logs_the_report_of_its_network_at_step_0(main_job: FinishedRun) -> None:
    client, run = main_job.in_mlflow()
    metrics = run.data.metrics
    # Only 3x3 kernels: one in the stem, four at stride 1, then in each stage one at the old stride, three at the new.
    assert metrics["receptive_field_px"] == 1 + 2 * (1 + 4 * 1 + (1 + 3 * 2) + (2 + 3 * 4) + (4 + 3 * 8))
    assert 0 < metrics["effective_receptive_field_px"] <= 31
    assert [point.step for point in client.get_metric_history(run.info.run_id, "gmacs")] == [0]
    artifacts = client.list_artifacts(run.info.run_id, "receptive_field")
    assert [artifact.path for artifact in artifacts] == ["receptive_field/layers.json", "receptive_field/report.html"]
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "receptive_field/layers.json")).read_text())
    assert len(table["data"]) == 68
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": artifacts[0].path, "type": "table"}]


def test_a_training_logs_its_first_augmented_images(main_job: FinishedRun) -> None:
    client, run = main_job.in_mlflow()
    file = client.download_artifacts(run.info.run_id, "data/augmented.png")
    with Image.open(file) as sent, Image.open(main_job.folder / "data" / "augmented.png") as written:
        assert np.array_equal(np.asarray(sent), np.asarray(written))
        assert sent.width > 8 * 112  # eight in a row


def test_the_report_verb_agrees_with_the_report_of_a_training(
    main_job: FinishedRun, report: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report on the same config has the initial weights of the training, one on the run has its best weights."""
    monkeypatch.chdir(main_job.root)
    name = main_job.folder.name
    initial = json.loads((main_job.folder / "receptive_field" / "report.json").read_text())
    fresh = ("+model=resnet", "+model.num_classes=10", "data.image_size=16", "out=fresh")
    for words, out, weights in (
        (fresh, "fresh", "newly initialised weights"),
        ([f"run=runs/{name}"], f"runs/{name}/reports/resnet18-16-*", f"weights of runs/{name}/checkpoints/best.ckpt"),
    ):
        report(*words, "layers=none")
        (written,) = main_job.root.glob(f"{out}/report.json")
        result = json.loads(written.read_text())
        assert (result["name"], result["image"]) == ("resnet18", [3, 16, 16])
        assert result["params_millions"] == initial["params_millions"]
        assert result["effective_measured_with"] == f"{weights}, over 4 crops of china.jpg, flower.jpg"
        assert (result["effective_sides_px"] == initial["effective_sides_px"]) == (out == "fresh")
    assert result["memory_bytes"] == initial["memory_bytes"]


def test_a_network_that_needs_values_is_trained_without_a_report(train: Typed, with_digits: Path) -> None:
    words = (
        "+model=resnet",
        "model._target_=tests.support.networks.by_numbers",
        "trust=true",
        "recipe.epochs=1",
        "data.batch_size=256",
    )
    assert "no report: ConvNet does not run on shapes (N, C, H, W) = (2, 3, 16, 16)" in train(*words)
    _, run = FinishedRun(with_digits, with_digits / "runs", "").in_mlflow()
    assert run.data.metrics["params_millions"] == pytest.approx(0.014666)
    assert not {"gmacs", "receptive_field_px", "effective_receptive_field_px"} & run.data.metrics.keys()
