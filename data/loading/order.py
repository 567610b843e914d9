"""Which samples form a batch: pure functions on arrays of (seed, epoch, step), the same on every machine.

Nothing here keeps state or builds a list as long as the data set. A shuffle is a
keyed bijection on 0..size-1 that is evaluated only at the positions asked for, so
the next batch of a billion samples costs what the next batch of a thousand costs.

The bijection is a Feistel network with cycle walking, as in Mitchell, Stokes,
Frank & Holmes 2022, "Bandwidth-optimal random shuffling for GPUs". Keys and random
draws come from the finaliser of SplitMix64 (Steele, Lea & Flood 2014) on a counter:
integer arithmetic that no library version changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.int64]  # rows of a split's index
Words = NDArray[np.uint64]

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd
ROUNDS = 24  # as Mitchell et al.: 8 favour some of the 120 orders of five
# What a number is drawn for, so that two uses of the same (seed, epoch) never share their bits.
SHARDS, WINDOW, AUGMENT, SPLIT, PACK, NETWORK = 1, 2, 3, 4, 5, 6


class EpochOrder(NamedTuple):
    """An epoch's shards in their order, and where each of them and each window of them begins."""

    shards: Samples  # (S,) shard numbers, permuted
    starts: Samples  # (S + 1,) position in the epoch at which each of them begins
    rows: Samples  # (S,) row of the index at which each of them begins
    windows: Samples  # (V + 1,) position in the epoch at which each window begins


def mix(words: Words) -> Words:
    """SplitMix64's finaliser: a bijection of 64-bit words in which every input bit moves every output bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def key(*numbers: int) -> np.uint64:
    """Fold whole numbers into one 64-bit key; another order of the numbers is another key."""
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = mix(state + MULTIPLIER + np.uint64(number % 2**64))
    return np.uint64(state[0])


def uniform(samples: Samples, count: int, *, seed: int, epoch: int) -> NDArray[np.float64]:
    """Draw `count` numbers in [0, 1) for each sample, as a function of (seed, epoch, sample) alone.

    Shapes: (N,) -> (N, count).
    """
    streams = mix(samples.astype(np.uint64) + key(AUGMENT, seed, epoch))  # (N,)
    steps = np.arange(1, count + 1, dtype=np.uint64) * MULTIPLIER
    words = mix(streams[:, None] + steps)  # (N, count)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(positions: Samples, size: int, *, permutation: np.uint64) -> Samples:
    """Where `permutation` sends each of `positions`, all in 0..size-1; over all positions, each value once.

    Shapes: (N,) -> (N,).
    """
    bits = max(2, int(size - 1).bit_length())
    keys = mix(permutation + np.arange(1, ROUNDS + 1, dtype=np.uint64))
    sent = np.empty(len(positions), np.int64)
    places, walking = np.arange(len(positions)), positions.astype(np.uint64)
    while len(places):  # the network permutes 0..2^bits-1: walk on from a value beyond size until one is within
        walking = _feistel(walking, keys, bits=bits)
        inside = walking < np.uint64(size)
        sent[places[inside]] = walking[inside]
        places, walking = places[~inside], walking[~inside]
    return sent


def _feistel(words: Words, keys: Words, *, bits: int) -> Words:
    """Permute 0..2^bits-1: each round adds a hash of the low half to the high half and exchanges the two."""
    low_bits = bits // 2
    for round_key in keys:
        high_bits = bits - low_bits
        low = words & np.uint64(2**low_bits - 1)
        # Multiply-shift hashing (Dietzfelbinger et al. 1997): the product's top bits, as many as the high half has.
        hashed = ((low + round_key) * MULTIPLIER) >> np.uint64(64 - high_bits)
        words = (low << np.uint64(high_bits)) | ((words >> np.uint64(low_bits)) ^ hashed)
        low_bits = high_bits  # halves of unequal width change places, so that any number of bits will do
    return words


@lru_cache(maxsize=4)
def epoch_order(shard_samples: tuple[int, ...], *, seed: int, epoch: int, window: int) -> EpochOrder:
    """Permute the shards and deal them into windows of at least `window` samples; the last may be smaller.

    A window that covers the data set is one full shuffle.
    """
    sizes = np.asarray(shard_samples, np.int64)  # (S,)
    first_rows = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    shards = permute(np.arange(len(sizes)), len(sizes), permutation=key(SHARDS, seed, epoch))
    starts = np.concatenate([[0], np.cumsum(sizes[shards])])  # (S + 1,)
    windows = [0]
    while windows[-1] < starts[-1]:
        closed = int(np.searchsorted(starts, min(windows[-1] + window, int(starts[-1]))))
        windows.append(int(starts[closed]))
    return EpochOrder(shards, starts, first_rows[shards], np.asarray(windows, np.int64))


def samples_at(positions: Samples, order: EpochOrder, *, seed: int, epoch: int) -> Samples:
    """The samples at these positions of the epoch: each window's samples permuted inside it.

    Shapes: (N,) -> (N,), rows of the index.
    """
    shuffled = np.empty_like(positions)
    window_of = np.searchsorted(order.windows, positions, side="right") - 1  # (N,)
    for window in sorted(set(window_of.tolist())):
        inside = window_of == window
        start, end = order.windows[window], order.windows[window + 1]
        within = permute(positions[inside] - start, int(end - start), permutation=key(WINDOW, seed, epoch, window))
        shuffled[inside] = start + within
    place = np.searchsorted(order.starts, shuffled, side="right") - 1  # (N,) place of the shard in the epoch
    return order.rows[place] + shuffled - order.starts[place]


def rank_positions(step: int, *, global_batch_size: int, rank: int, world_size: int) -> Samples:
    """This rank's slice of global batch `step`, as positions in the epoch; the global batch knows no ranks.

    Shapes: -> (global_batch_size / world_size,).
    Raises: ValueError when the batch does not divide among the ranks.
    """
    if global_batch_size % world_size:
        raise ValueError(f"a global batch of {global_batch_size} does not divide among {world_size} ranks")
    share = global_batch_size // world_size
    start = step * global_batch_size + rank * share
    return np.arange(start, start + share)


def num_evaluation_steps(num_samples: int, *, batch_size: int, world_size: int) -> int:
    """Steps in which every rank sees at most `batch_size` samples (2 where 1 does not go), and at least one.

    Raises: ValueError when there are more ranks than samples.
    """
    if world_size > num_samples:
        raise ValueError(f"{world_size} ranks are more than the {num_samples} images to evaluate: use fewer devices")
    return min(-(-num_samples // (batch_size * world_size)), num_samples // world_size)


def evaluation_slice(step: int, num_samples: int, *, batch_size: int, rank: int, world_size: int) -> Samples:
    """This rank's samples of an evaluation step: no sample padded, repeated or dropped on any number of ranks.

    The samples are cut into steps x ranks pieces that differ by one at most, so that
    all ranks take the same number of steps, none of them empty.

    Shapes: -> (n,), n at least 1.
    """
    num_pieces = num_evaluation_steps(num_samples, batch_size=batch_size, world_size=world_size) * world_size
    piece = step * world_size + rank
    return np.arange(piece * num_samples // num_pieces, (piece + 1) * num_samples // num_pieces)


@dataclass(frozen=True)
class TrainingPlan:
    """Which samples one rank trains on: every sample of the split once an epoch over all ranks.

    A global batch is batch_size x accumulate x world_size samples; the last, incomplete
    one of an epoch is dropped, another one each epoch. `limit` shortens an epoch to so many
    batches of each rank.

    Raises: ValueError when the split has fewer samples than one global batch.
    """

    shard_samples: tuple[int, ...]
    seed: int
    window: int
    batch_size: int  # of one rank and one step
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1
    limit: int | None = None

    def __post_init__(self) -> None:
        if min(self.batch_size, self.accumulate, self.window) < 1:
            raise ValueError(
                f"batch_size={self.batch_size}, accumulate={self.accumulate} and window={self.window}: "
                "each must be at least 1"
            )
        if self.num_steps == 0:
            raise ValueError(
                f"{sum(self.shard_samples)} training images are fewer than a global batch of {self.global_batch_size} "
                f"(batch_size {self.batch_size} x accumulate {self.accumulate} x {self.world_size} ranks): "
                "lower data.batch_size, recipe.accumulate or trainer.devices"
            )

    @property
    def global_batch_size(self) -> int:
        """Samples between two optimizer steps, over all ranks."""
        return self.batch_size * self.accumulate * self.world_size

    @property
    def largest_batch(self) -> int:
        """Samples in every batch."""
        return self.batch_size

    @property
    def num_steps(self) -> int:
        """Batches of one rank in an epoch; `accumulate` of them make an optimizer step."""
        whole = sum(self.shard_samples) // self.global_batch_size * self.accumulate
        return whole if self.limit is None else min(self.limit, whole)

    def samples(self, epoch: int, step: int) -> Samples:
        """This rank's samples of a step: (batch_size,) rows of the index."""
        epoch_plan = epoch_order(self.shard_samples, seed=self.seed, epoch=epoch, window=self.window)
        # Micro-batches are cut from the order like batches: `accumulate` in a row are one global batch.
        positions = rank_positions(
            step, global_batch_size=self.batch_size * self.world_size, rank=self.rank, world_size=self.world_size
        )
        return samples_at(positions, epoch_plan, seed=self.seed, epoch=epoch)


@dataclass(frozen=True)
class EvaluationPlan:
    """Which samples one rank evaluates: every sample of the split exactly once over all ranks, in the index's order.

    Raises: ValueError when there are more ranks than samples.
    """

    num_samples: int
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")
        num_evaluation_steps(self.num_samples, batch_size=self.batch_size, world_size=self.world_size)

    @property
    def largest_batch(self) -> int:
        """Samples in the largest batch of any rank."""
        return -(-self.num_samples // (self.num_steps * self.world_size))

    @property
    def num_steps(self) -> int:
        """Batches of one rank, the same on all."""
        return num_evaluation_steps(self.num_samples, batch_size=self.batch_size, world_size=self.world_size)

    def samples(self, epoch: int, step: int) -> Samples:
        """This rank's samples of a step, whatever the epoch: (n,) rows of the index."""
        return evaluation_slice(
            step, self.num_samples, batch_size=self.batch_size, rank=self.rank, world_size=self.world_size
        )
