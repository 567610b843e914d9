"""Both evaluations give the same numbers on any number of ranks, with any batch size, for any number of images."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy.special import log_softmax
from sklearn.metrics import f1_score, top_k_accuracy_score

from data.loading.inputs import split_sources
from data.shards.dataset import Dataset
from tests.support.evaluations import RankAnswer, evaluate_twice
from tests.support.rank_pool import RankPool, fail_last

MOST_RANKS, MOST_IMAGES, MOST_IN_BATCH = 4, 40, 9


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Four ranks, for all examples."""
    ranks = RankPool(MOST_RANKS, tmp_path_factory.mktemp("groups"), module="tests.support.evaluations")
    yield ranks
    ranks.close()


def levels_of(dataset: Dataset, split: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Decode a split with PIL: levels (N, 192), channels first, and labels (N,)."""
    levels, labels = [], []
    for source, label in split_sources(dataset, split, limit=100 if split == "train" else None):
        pixels = np.asarray(Image.open(io.BytesIO(source.read())).convert("RGB"), np.int64)  # (8, 8, 3)
        levels.append(pixels.transpose(2, 0, 1).ravel())
        labels.append(label)
    return np.stack(levels), np.array(labels)


class Expected:
    """The numbers of an evaluation, computed from PIL's pixels by NumPy, SciPy and scikit-learn."""

    def __init__(self, dataset: Dataset) -> None:
        levels, labels = levels_of(dataset, "train")
        self.templates = np.stack([levels[np.flatnonzero(labels == label)[0]] for label in range(10)])
        levels, self.labels = levels_of(dataset, "val")
        self.logits = np.abs(levels[:, None] - self.templates).sum(2) / -1024  # (N, 10)
        assert np.ptp(np.sort(self.logits[:MOST_IMAGES]), axis=1).min() > 0

    def of(self, count: int) -> dict[str, float]:
        """The metrics of the first images."""
        logits, labels = self.logits[:count], self.labels[:count]
        predicted, classes = logits.argmax(1), np.arange(10)
        present = np.unique(labels)
        return {
            "top1": np.mean(predicted == labels),
            "top5": top_k_accuracy_score(labels, logits, k=5, labels=classes),
            "loss": -log_softmax(logits, axis=1)[np.arange(count), labels].mean(),
            "f1_macro": f1_score(labels, predicted, average="macro", labels=present, zero_division=0),
            "balanced_accuracy": np.mean([np.mean(predicted[labels == label] == label) for label in present]),
        }


@pytest.fixture(scope="module")
def expected(digits: Dataset) -> Expected:
    return Expected(digits)


def assert_training_is_exact(answers: list[RankAnswer], expected: Expected, *, num_images: int) -> None:
    assert sorted(sample for one in answers for sample in one.samples) == list(range(num_images))
    # Logged in float32. The loss is the sum in float64 of each image's in float32, in an order that ranks change.
    values = {f"val/{name}": float(np.float32(value)) for name, value in expected.of(num_images).items()}
    logits, labels = (torch.from_numpy(one[:num_images]) for one in (expected.logits, expected.labels))
    losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    values["val/loss"] = pytest.approx(float(losses.double().mean()), rel=2**-23, abs=0)
    for one in answers:
        assert one.refusal is None
        assert one.images == num_images
        assert one.training == values


def assert_verb_is_exact(answers: list[RankAnswer], expected: Expected, *, num_images: int) -> None:
    first, *others = answers
    assert [one.answers for one in others] == [None] * len(others)
    assert first.answers is not None
    assert first.answers.labels.tolist() == expected.labels[:num_images].tolist()
    # A row for each image in the order of the index: each was evaluated once.
    logarithms = torch.log_softmax(torch.from_numpy(expected.logits[:num_images]), dim=1).numpy()
    np.testing.assert_array_equal(first.answers.log_probabilities, logarithms)
    values = expected.of(num_images)
    values["loss"] = pytest.approx(values["loss"], rel=1e-14, abs=0)  # SciPy's logarithms
    assert {name: first.summary[name] for name in values} == values


@settings(max_examples=25)
@given(
    world_size=st.integers(1, MOST_RANKS),
    batch_size=st.integers(1, MOST_IN_BATCH),
    num_images=st.integers(1, MOST_IMAGES),
)
@example(world_size=1, batch_size=1, num_images=1)
@example(world_size=2, batch_size=9, num_images=1)
@example(world_size=4, batch_size=1, num_images=3)
@example(world_size=4, batch_size=9, num_images=4)
@example(world_size=3, batch_size=2, num_images=40)
@example(world_size=4, batch_size=1, num_images=40)
def test_evaluations_are_exact_on_any_number_of_ranks(
    pool: RankPool, digits: Dataset, expected: Expected, world_size: int, batch_size: int, num_images: int
) -> None:
    arguments = {"dataset": digits, "templates": expected.templates, "batch_size": batch_size}
    answers = pool.run(evaluate_twice, world_size=world_size, num_images=num_images, **arguments)
    assert len(answers) == world_size
    assert_verb_is_exact(answers, expected, num_images=num_images)
    if world_size > num_images:
        sentence = f"{world_size} ranks are more than the {num_images} images to evaluate: use fewer devices"
        assert [one.refusal for one in answers] == [sentence] * world_size
    else:
        assert_training_is_exact(answers, expected, num_images=num_images)


@pytest.mark.parametrize(("how", "message"), [("exit", "^a rank has ended$"), ("raise", "KeyError: 'of a rank'")])
def test_ranks_end_with_the_first_that_fails(tmp_path: Path, how: str, message: str) -> None:
    ranks = RankPool(2, tmp_path, module="torch")
    with pytest.raises(RuntimeError, match=message):
        ranks.run(fail_last, world_size=2, how=how)
    for process_id in ranks.process_ids:
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)
