"""Who sees which sample when: each property is checked by listing everything."""

from __future__ import annotations

import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loading import order
from data.loading.order import EvaluationPlan, TrainingPlan

shard_lists = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(tuple)
windows = st.sampled_from([1, 7, 50, 4_000_000])
seeds = st.integers(0, 2**63)


def whole_epoch(shards: tuple[int, ...], *, seed: int, epoch: int, window: int) -> list[int]:
    plan = order.epoch_order(shards, seed=seed, epoch=epoch, window=window)
    return order.samples_at(np.arange(sum(shards)), plan, seed=seed, epoch=epoch).tolist()


def test_mix_is_splitmix64() -> None:
    # The first three numbers of SplitMix64 seeded with 1234567, as published with the reference code in C.
    states = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert order.mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(size=st.integers(1, 3000), numbers=st.lists(st.integers(-5, 2**64), max_size=3))
def test_permute_sends_every_position_to_another_place(size: int, numbers: list[int]) -> None:
    assert sorted(order.permute(np.arange(size), size, permutation=order.key(*numbers))) == list(range(size))


@pytest.mark.parametrize("size", [4, 5])
def test_permute_prefers_no_order(size: int) -> None:
    draws = 6_000
    counts = Counter(
        tuple(order.permute(np.arange(size), size, permutation=order.key(7, draw))) for draw in range(draws)
    )
    orders = list(itertools.permutations(range(size)))
    expected = draws / len(orders)
    chi_squared = sum((counts[one] - expected) ** 2 / expected for one in orders)
    degrees = len(orders) - 1
    assert chi_squared < degrees + 4 * (2 * degrees) ** 0.5  # four standard deviations above the mean


@given(shards=shard_lists, seed=seeds, epoch=st.integers(0, 1000), window=windows)
def test_an_epoch_holds_every_sample_once(shards: tuple[int, ...], seed: int, epoch: int, window: int) -> None:
    assert sorted(whole_epoch(shards, seed=seed, epoch=epoch, window=window)) == list(range(sum(shards)))


@given(shards=shard_lists, seed=seeds, epoch=st.integers(0, 1000))
def test_the_same_seed_and_epoch_give_the_same_order(shards: tuple[int, ...], seed: int, epoch: int) -> None:
    first = whole_epoch(shards, seed=seed, epoch=epoch, window=50)
    order.epoch_order.cache_clear()
    assert whole_epoch(shards, seed=seed, epoch=epoch, window=50) == first


@given(seed=seeds, epoch=st.integers(0, 1000), window=windows)
def test_another_epoch_and_another_seed_give_another_order(seed: int, epoch: int, window: int) -> None:
    shards = (40, 30, 50)
    orders = {
        tuple(whole_epoch(shards, seed=s, epoch=e, window=window))
        for s, e in [(seed, epoch), (seed, epoch + 1), (seed + 1, epoch)]
    }
    assert len(orders) == 3


def test_a_window_that_covers_the_data_set_mixes_all_shards() -> None:
    shards = (100,) * 10
    first_hundred = whole_epoch(shards, seed=0, epoch=0, window=1000)[:100]
    assert len({sample // 100 for sample in first_hundred}) == 10


def test_a_smaller_window_reads_few_shards_at_a_time() -> None:
    shards = (100,) * 10
    samples = whole_epoch(shards, seed=0, epoch=0, window=200)
    for start in range(0, 1000, 200):
        assert len({sample // 100 for sample in samples[start : start + 200]}) == 2


@settings(max_examples=50)
@given(shards=shard_lists, seed=seeds, epoch=st.integers(0, 50), window=windows)
def test_global_batches_do_not_depend_on_the_number_of_ranks(
    shards: tuple[int, ...], seed: int, epoch: int, window: int
) -> None:
    global_batch_size = 24
    if sum(shards) < global_batch_size:
        return
    epochs = []
    for world_size in (1, 2, 3, 8):
        plans = [
            TrainingPlan(
                shards, seed=seed, window=window, batch_size=24 // world_size, rank=rank, world_size=world_size
            )
            for rank in range(world_size)
        ]
        batches = [[plan.samples(epoch, step).tolist() for plan in plans] for step in range(plans[0].num_steps)]
        assert all(len(set(itertools.chain(*ranks))) == global_batch_size for ranks in batches), "ranks overlap"
        epochs.append([list(itertools.chain(*ranks)) for ranks in batches])
    assert epochs[0] == epochs[1] == epochs[2] == epochs[3]
    seen = list(itertools.chain(*epochs[0]))
    assert len(seen) == len(set(seen)) == sum(shards) // global_batch_size * global_batch_size


def test_accumulated_batches_make_the_global_batches_of_twice_the_size() -> None:
    shards, common = (30, 41, 29), {"seed": 3, "window": 1000}
    whole = TrainingPlan(shards, batch_size=16, **common)
    halves = TrainingPlan(shards, batch_size=8, accumulate=2, **common)
    assert halves.num_steps == 2 * whole.num_steps == 12
    for step in range(whole.num_steps):
        joined = [*halves.samples(0, 2 * step), *halves.samples(0, 2 * step + 1)]
        assert joined == whole.samples(0, step).tolist()


@given(num_samples=st.integers(1, 500), batch_size=st.integers(1, 64), world_size=st.integers(1, 9))
def test_evaluation_sees_every_image_once(num_samples: int, batch_size: int, world_size: int) -> None:
    if world_size > num_samples:
        with pytest.raises(ValueError, match="ranks are more than"):
            EvaluationPlan(num_samples, batch_size, world_size=world_size)
        return
    plans = [EvaluationPlan(num_samples, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [plan.samples(0, step) for step in range(plans[0].num_steps) for plan in plans]
    largest = plans[0].largest_batch
    assert largest <= max(batch_size, 2)  # 3 images on 2 ranks in batches of 1 have no other exact division
    assert all(1 <= len(batch) <= largest for batch in batches)
    assert np.concatenate(batches).tolist() == list(range(num_samples))


@pytest.mark.parametrize("mistake", [{"batch_size": 0}, {"batch_size": 4, "accumulate": 0}, {"batch_size": 101}])
def test_a_plan_that_cannot_be_is_refused(mistake: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="batch"):
        TrainingPlan((50, 50), seed=0, window=100, **mistake)


def test_a_hundred_million_samples_are_planned_in_little_memory() -> None:
    order.epoch_order.cache_clear()
    plan = TrainingPlan((10_000,) * 10_000, seed=0, window=4_000_000, batch_size=1024)
    tracemalloc.start()
    samples = plan.samples(5, 12_345)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(samples.tolist())) == 1024
    assert 0 <= samples.min() <= samples.max() < 100_000_000
    assert peak < 20e6  # bytes; a list of all samples would be 800 MB


def test_draws_are_uniform_and_belong_to_a_sample() -> None:
    samples = np.arange(20_000)
    draws = order.uniform(samples, 5, seed=3, epoch=4)
    assert draws.shape == (20_000, 5)
    assert 0 <= draws.min() <= draws.max() < 1
    np.testing.assert_allclose(draws.mean(axis=0), 0.5, atol=0.01)
    np.testing.assert_allclose(np.corrcoef(draws.T), np.eye(5), atol=0.03)
    np.testing.assert_array_equal(order.uniform(samples[[17, 5]], 5, seed=3, epoch=4), draws[[17, 5]])
    assert not np.array_equal(order.uniform(samples, 5, seed=3, epoch=5), draws)
