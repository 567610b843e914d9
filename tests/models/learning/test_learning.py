"""Each architecture learns real digits in 200 optimizer steps of the train verb, in its smallest variant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from data.shards.dataset import Dataset
from pipeline.train.__main__ import VERB, main
from tests.support.commands import call_verb, journal
from tests.support.published import SMALLEST

STEPS = (
    *("data=digits", "recipe.epochs=4", "+trainer.limit_train_batches=50", "data.batch_size=28"),
    *("trainer=cpu", "trainer.precision=32-true", "log_every=50", "tracking=none"),
)


class Reference(NamedTuple):
    """Accuracy of a good run, and the settings that a training this short needs."""

    top1: float
    words: tuple[str, ...] = ()


# Of 359 images, with torch 2.14.1 on two cores of an AMD EPYC: `python -m pipeline.train +model=... model.variant=...`
# with STEPS, the words here and seed 0. 200 steps are too few for CoAtNet's stochastic depth. Dropout moves AlexNet
# most, by 0.05.
REFERENCES = {
    "lenet": Reference(0.942),
    "alexnet": Reference(0.747),
    "vgg": Reference(0.942),
    "resnet": Reference(0.925),
    "resnext": Reference(0.838, ("recipe.optimizer.lr=0.02",)),
    "mobilenet": Reference(0.972),
    "efficientnet": Reference(0.933),
    "convnext": Reference(0.972),
    "coatnet": Reference(0.955, ("model.stochastic_depth=0.0",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", REFERENCES)
def test_200_steps_reach_nine_tenths_of_a_good_run(
    architecture: str, tmp_path: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reference = REFERENCES[architecture]
    words = [f"+model={architecture}", f"model.variant={SMALLEST[architecture]}", f"data.root={digits.root}", *STEPS]
    call_verb(VERB, main, [*words, *reference.words])
    (run,) = (tmp_path / "runs").iterdir()
    assert journal(run)[-1]["step"] == 200
    assert json.loads((run / "result.json").read_text())["val/top1"] >= 0.9 * reference.top1


def test_every_architecture_of_the_papers_learns() -> None:
    """A new architecture may have a line here; it needs none."""
    assert len(REFERENCES) == 9
    assert REFERENCES.keys() <= SMALLEST.keys()
    assert min(reference.top1 for reference in REFERENCES.values()) > 0.7
