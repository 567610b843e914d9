"""The order of samples: each property is checked by listing all of them."""

from __future__ import annotations

import itertools
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import draws
from data.loading import order
from data.loading.datamodule import LoaderSettings
from data.loading.order import EvaluationPlan, TrainingPlan

shard_lists = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(tuple)
windows = st.sampled_from([1, 7, 50, 4_000_000])
seeds = st.integers(0, 2**63)


def complete_epoch(shards: tuple[int, ...], *, seed: int, epoch: int, shuffle_window: int) -> list[int]:
    plan = order.epoch_order(shards, seed=seed, epoch=epoch, shuffle_window=shuffle_window)
    return order.samples_at(np.arange(sum(shards)), plan, seed=seed, epoch=epoch).tolist()


def test_mix_is_splitmix64() -> None:
    # The first three numbers for the seed 1234567, published with the reference code in C.
    states = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert draws.mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(size=st.integers(1, 3000), numbers=st.lists(st.integers(-5, 2**64), max_size=3))
def test_permute_is_a_bijection(size: int, numbers: list[int]) -> None:
    assert sorted(draws.permute(np.arange(size), size, permutation=draws.key(*numbers))) == list(range(size))


@pytest.mark.parametrize("size", [4, 5])
def test_permute_gives_all_orders_equal_probability(size: int) -> None:
    num_draws = 6_000
    counts = Counter(
        tuple(draws.permute(np.arange(size), size, permutation=draws.key(7, draw))) for draw in range(num_draws)
    )
    orders = list(itertools.permutations(range(size)))
    expected = num_draws / len(orders)
    chi_squared = sum((counts[one] - expected) ** 2 / expected for one in orders)
    degrees = len(orders) - 1
    assert chi_squared < degrees + 4 * (2 * degrees) ** 0.5  # four standard deviations above the mean


@given(shards=shard_lists, seed=seeds, epoch=st.integers(0, 1000), shuffle_window=windows)
def test_an_epoch_holds_every_sample_once(shards: tuple[int, ...], seed: int, epoch: int, shuffle_window: int) -> None:
    samples = complete_epoch(shards, seed=seed, epoch=epoch, shuffle_window=shuffle_window)
    assert sorted(samples) == list(range(sum(shards)))


@given(shards=shard_lists, seed=seeds, epoch=st.integers(0, 1000))
def test_the_same_seed_and_epoch_give_the_same_order(shards: tuple[int, ...], seed: int, epoch: int) -> None:
    first = complete_epoch(shards, seed=seed, epoch=epoch, shuffle_window=50)
    order.epoch_order.cache_clear()
    assert complete_epoch(shards, seed=seed, epoch=epoch, shuffle_window=50) == first


@given(seed=seeds, epoch=st.integers(0, 1000), shuffle_window=windows)
def test_another_epoch_and_another_seed_give_another_order(seed: int, epoch: int, shuffle_window: int) -> None:
    shards = (40, 30, 50)
    orders = {
        tuple(complete_epoch(shards, seed=s, epoch=e, shuffle_window=shuffle_window))
        for s, e in [(seed, epoch), (seed, epoch + 1), (seed + 1, epoch)]
    }
    assert len(orders) == 3


def test_a_shuffle_window_over_the_data_set_mixes_all_shards() -> None:
    shards = (100,) * 10
    first_hundred = complete_epoch(shards, seed=0, epoch=0, shuffle_window=1000)[:100]
    assert len({sample // 100 for sample in first_hundred}) == 10


def test_a_small_shuffle_window_reads_few_shards_at_a_time() -> None:
    shards = (100,) * 10
    samples = complete_epoch(shards, seed=0, epoch=0, shuffle_window=200)
    for start in range(0, 1000, 200):
        assert len({sample // 100 for sample in samples[start : start + 200]}) == 2


@settings(max_examples=50)
@given(shards=shard_lists, seed=seeds, epoch=st.integers(0, 50), shuffle_window=windows)
def test_global_batches_do_not_depend_on_the_number_of_ranks(
    shards: tuple[int, ...], seed: int, epoch: int, shuffle_window: int
) -> None:
    global_batch_size = 24
    if sum(shards) < global_batch_size:
        return
    epochs = []
    for world_size in (1, 2, 3, 8):
        common = {"shuffle_window": shuffle_window, "batch_size": 24 // world_size, "world_size": world_size}
        plans = [TrainingPlan(shards, seed=seed, rank=rank, **common) for rank in range(world_size)]
        batches = [[plan.samples(epoch, step).tolist() for plan in plans] for step in range(plans[0].num_steps)]
        assert all(len(set(itertools.chain(*ranks))) == global_batch_size for ranks in batches), "ranks overlap"
        epochs.append([list(itertools.chain(*ranks)) for ranks in batches])
    assert epochs[0] == epochs[1] == epochs[2] == epochs[3]
    samples = list(itertools.chain(*epochs[0]))
    assert len(samples) == len(set(samples)) == sum(shards) // global_batch_size * global_batch_size


def test_two_accumulated_batches_are_one_of_twice_the_size() -> None:
    shards, common = (30, 41, 29), {"seed": 3, "shuffle_window": 1000}
    large = TrainingPlan(shards, batch_size=16, **common)
    small = TrainingPlan(shards, batch_size=8, accumulate=2, **common)
    assert small.num_steps == 2 * large.num_steps == 12
    for step in range(large.num_steps):
        joined = [*small.samples(0, 2 * step), *small.samples(0, 2 * step + 1)]
        assert joined == large.samples(0, step).tolist()


@given(num_samples=st.integers(1, 500), batch_size=st.integers(1, 64), world_size=st.integers(1, 9))
def test_evaluation_counts_every_image_once(num_samples: int, batch_size: int, world_size: int) -> None:
    if world_size > num_samples:
        with pytest.raises(ValueError, match="ranks are more than"):
            EvaluationPlan(num_samples, batch_size, world_size=world_size)
        return
    plans = [EvaluationPlan(num_samples, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [plan.samples(0, step) for step in range(plans[0].num_steps) for plan in plans]
    largest = plans[0].largest_batch
    assert largest <= max(batch_size, 2)  # 3 images on 2 ranks in batches of 1 cannot be divided otherwise
    assert all(1 <= len(batch) <= largest for batch in batches)
    assert np.concatenate(batches).tolist() == list(range(num_samples))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"batch_size": 4, "accumulate": 0}, "accumulate=0 must be at least 1"),
        ({"batch_size": 101}, r"100 training images .* of 101 \(batch_size=101 x accumulate=1 x 1 ranks\): lower"),
    ],
)
def test_an_invalid_plan_is_rejected(mistake: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingPlan((50, 50), seed=0, shuffle_window=100, **mistake)
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        EvaluationPlan(10, 0)


def test_fewer_images_than_a_global_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="100 training images are fewer than a global batch of 102"):
        TrainingPlan((50, 50), seed=0, shuffle_window=100, batch_size=51, accumulate=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("accumulate", 0), ("shuffle_window", -1), ("readahead", 1.5), ("threads", 0)],
)
def test_settings_of_loaders_are_positive_integers(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value} must be an integer of at least 1"):
        LoaderSettings(**({"batch_size": 8} | {name: value}))


def test_planning_a_hundred_million_samples_takes_little_memory() -> None:
    order.epoch_order.cache_clear()
    plan = TrainingPlan((10_000,) * 10_000, seed=0, shuffle_window=4_000_000, batch_size=1024)
    tracemalloc.start()
    samples = plan.samples(5, 12_345)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(samples.tolist())) == 1024
    assert 0 <= samples.min() <= samples.max() < 100_000_000
    assert peak < 20e6  # bytes; a list of all samples would be 800 MB


def test_draws_are_uniform_and_depend_on_the_sample_alone() -> None:
    samples = np.arange(20_000)
    drawn = draws.uniform(samples, 5, seed=3, epoch=4)
    assert drawn.shape == (20_000, 5)
    assert 0 <= drawn.min() <= drawn.max() < 1
    np.testing.assert_allclose(drawn.mean(axis=0), 0.5, atol=0.01)
    np.testing.assert_allclose(np.corrcoef(drawn.T), np.eye(5), atol=0.03)
    np.testing.assert_array_equal(draws.uniform(samples[[17, 5]], 5, seed=3, epoch=4), drawn[[17, 5]])
    assert not np.array_equal(draws.uniform(samples, 5, seed=3, epoch=5), drawn)


def test_coming_shards_are_those_of_the_next_steps() -> None:
    plan = TrainingPlan((5, 3, 7, 2, 6, 4, 9, 5, 8), seed=3, shuffle_window=8, batch_size=2, world_size=2)
    first_rows = np.cumsum([0, *plan.shard_samples])

    def shards_read(epoch: int, step: int) -> set[int]:
        ranks = [replace(plan, rank=rank).samples(epoch, step) for rank in range(2)]
        return set((np.searchsorted(first_rows, np.concatenate(ranks), side="right") - 1).tolist())

    steps = [(epoch, step) for epoch in range(2) for step in range(plan.num_steps)]
    windows = [plan.window(*position) for position in steps]
    assert windows[: plan.num_steps] == sorted(windows[: plan.num_steps])
    assert max(windows) > 1
    for number, (position, window) in enumerate(zip(steps, windows, strict=True)):
        coming = plan.coming_shards(position[0], window)
        assert len(coming) == len(set(coming))
        assert shards_read(*position) <= set(coming)
        if number + 1 < len(steps):
            assert shards_read(*steps[number + 1]) <= set(coming)
