"""The draws of dropout depend on seed, step and rank, and on nothing drawn before."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import torch
from torch.nn import functional

from pipeline.train.callbacks.seeding import SeedEachBatch


def draw(*, seed: int = 0, step: int = 0, batch_index: int = 0, rank: int = 0) -> tuple[float, ...]:
    """The ones that dropout keeps in a training batch."""
    trainer, module = SimpleNamespace(global_step=step, global_rank=rank), SimpleNamespace(device=torch.device("cpu"))
    SeedEachBatch(seed).on_train_batch_start(trainer, module, None, batch_index)
    return tuple(functional.dropout(torch.ones(64), 0.5).tolist())


def test_a_batch_drops_the_same_units_whatever_was_drawn_before() -> None:
    first = draw(step=7)
    torch.rand(13)
    assert draw(step=7) == first


def test_seeds_steps_accumulated_batches_and_ranks_draw_apart() -> None:
    places = itertools.product(range(3), repeat=4)
    drawn = [draw(seed=s, step=t, batch_index=b, rank=r) for s, t, b, r in places]
    assert len(set(drawn)) == len(drawn) == 81
