"""Each architecture learns: 200 optimizer steps on real digits, by the command people type, at its smallest variant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from data.dataset import Dataset
from pipeline.config import check_command_line, compose
from pipeline.train import main
from tests.published import SMALLEST

STEPS = ("recipe.epochs=2", "data.batch_size=14", "+trainer.limit_train_batches=100", "log_every=100", "tracking=none")


class Learned(NamedTuple):
    """What a good run reached (seed 0, float32, two cores), and what a training this short needs to be told."""

    top1: float
    words: tuple[str, ...] = ()


# Rates are published for 256 images a step, and 200 steps are too few for averages with a momentum of 0.01.
LEARNED = {
    "lenet": Learned(0.886),
    "vgg": Learned(0.830),
    "resnet": Learned(0.852, ("recipe.optimizer.lr=0.02",)),
    "convnext": Learned(0.930),
    "mobilenet": Learned(0.936, ("model.norm_momentum=0.1", "recipe.optimizer.lr=0.001")),
    "efficientnet": Learned(0.758, ("recipe.optimizer.lr=0.001",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", LEARNED)
def test_200_steps_reach_nine_tenths_of_a_good_run(
    architecture: str, tmp_path: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    learned = LEARNED[architecture]
    words = [f"+model={architecture}", f"model.variant={SMALLEST[architecture]}", f"data.root={digits.root}", *STEPS]
    main(compose("train", check_command_line("train", [*words, "data=digits", *learned.words])))
    (run,) = (tmp_path / "runs").iterdir()
    reached = json.loads((run / "result.json").read_text())["val/top1"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 200
    assert reached >= 0.9 * learned.top1
