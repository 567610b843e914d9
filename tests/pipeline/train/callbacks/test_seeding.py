"""The draws of dropout and mixing depend on seed, step and rank, and on nothing drawn before."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional

from models.learning.classifier import Classifier
from models.learning.mixing import Mixing
from pipeline.train.callbacks.seeding import SeedEachBatch
from tests.support.networks import make_recipe, plain

MODULE = Classifier(plain(num_classes=3), num_classes=3, recipe=make_recipe())


def draw(*, seed: int = 0, step: int = 0, batch_index: int = 0, rank: int = 0) -> tuple[tuple[float, ...], float]:
    """The ones that dropout keeps in a training batch, and the ratio with which its images are mixed."""
    trainer = SimpleNamespace(global_step=step, global_rank=rank)
    SeedEachBatch(seed).on_train_batch_start(trainer, MODULE, None, batch_index)
    ratio = Mixing(mixup_alpha=1.0).draw(MODULE.batch_key, height=1, width=1).lam
    return tuple(functional.dropout(torch.ones(64), 0.5).tolist()), ratio


def test_a_batch_drops_the_same_units_and_mixes_the_same_whatever_was_drawn_before() -> None:
    first = draw(step=7)
    torch.rand(13)
    np.random.rand(13)
    assert draw(step=7) == first


def test_seeds_steps_accumulated_batches_and_ranks_draw_apart() -> None:
    places = itertools.product(range(3), repeat=4)
    drawn = [draw(seed=s, step=t, batch_index=b, rank=r) for s, t, b, r in places]
    assert [len(set(part)) for part in zip(*drawn, strict=True)] == [81, 81]
