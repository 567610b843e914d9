"""What a training shows of its network at its beginning, beside a report that is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun

from tests.pipeline.conftest import Report, Train


def assert_reported(client: MlflowClient, run: MlflowRun) -> None:
    """The report, at step 0: every layer in a table that the dashboard shows, and the page."""
    metrics = run.data.metrics
    # 3x3 kernels alone: one in the stem, four at jump 1, then in each stage one at the old jump and three at the new.
    assert metrics["receptive_field_px"] == 1 + 2 * (1 + 4 * 1 + (1 + 3 * 2) + (2 + 3 * 4) + (4 + 3 * 8))
    assert 0 < metrics["effective_receptive_field_px"] <= 31
    assert [point.step for point in client.get_metric_history(run.info.run_id, "gmacs")] == [0]
    artifacts = client.list_artifacts(run.info.run_id, "receptive_field")
    assert [artifact.path for artifact in artifacts] == ["receptive_field/layers.json", "receptive_field/report.html"]
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "receptive_field/layers.json")).read_text())
    assert len(table["data"]) == 68
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": artifacts[0].path, "type": "table"}]


def assert_reports_agree(report: Report, folder: Path) -> None:
    """A report of its own has the first weights of the training, and one of the run those that came of it."""
    begun = json.loads((folder / "receptive_field" / "report.json").read_text())
    fresh = ("+model=resnet", "+model.num_classes=10", "data.image_size=16", "out=fresh")
    for words, out in ((fresh, "fresh"), ([f"run=runs/{folder.name}"], f"runs/{folder.name}/reports/resnet18-16-*")):
        report(*words, "layers=none")
        (written,) = folder.parent.parent.glob(f"{out}/report.json")
        found = json.loads(written.read_text())
        assert (found["name"], found["image"]) == ("resnet18", [3, 16, 16])
        assert found["params_millions"] == begun["params_millions"]
        measured, equal = found["effective_measured_with"], found["effective_sides_px"] == begun["effective_sides_px"]
        weights = "fresh weights" if out == "fresh" else f"weights of runs/{folder.name}/checkpoints/best.ckpt"
        assert measured == f"{weights}, over 4 crops of china.jpg, flower.jpg"
        assert equal == (out == "fresh")
    assert found["memory_bytes"] == begun["memory_bytes"]


def test_a_network_that_looks_at_numbers_is_trained_without_a_report(train: Train, with_digits: Path) -> None:
    words = (
        "+model=resnet",
        "model._target_=tests.support.networks.by_numbers",
        "trust=true",
        "recipe.epochs=1",
        "data.batch_size=256",
    )
    assert "no report: ConvNet does not run on shapes (N, C, H, W) = (2, 3, 16, 16)" in train(*words)
    client = MlflowClient(f"sqlite:///{with_digits / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("convoy").experiment_id])
    assert run.data.metrics["params_millions"] == pytest.approx(0.014666)
    assert not {"gmacs", "receptive_field_px", "effective_receptive_field_px"} & run.data.metrics.keys()
