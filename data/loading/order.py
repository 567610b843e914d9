"""The samples of each batch: stateless functions of (seed, epoch, step) that build no list as long as the data set."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data.arguments import ArgumentError, require
from data.draws import SHARDS, WINDOW, Samples, key, permute


class Position(NamedTuple):
    """A batch of a plan: its epoch and its step in that epoch."""

    epoch: int
    step: int

    def following(self, num_steps: int) -> Position:
        """Return the position of the next batch when an epoch has `num_steps` batches."""
        return Position(self.epoch, self.step + 1) if self.step + 1 < num_steps else Position(self.epoch + 1, 0)


class EpochOrder(NamedTuple):
    """The order of an epoch's shards and its shuffle windows."""

    shards: Samples  # (S,) shard numbers, permuted
    starts: Samples  # (S + 1,) position in the epoch of each shard's first sample
    rows: Samples  # (S,) row of the index of each shard's first sample
    windows: Samples  # (V + 1,) position in the epoch of each shuffle window's first sample


@lru_cache(maxsize=4)
def epoch_order(shard_samples: tuple[int, ...], *, seed: int, epoch: int, shuffle_window: int) -> EpochOrder:
    """Permute the shards and group them into shuffle windows of at least `shuffle_window` samples, except the last."""
    sizes = np.asarray(shard_samples, np.int64)  # (S,)
    first_rows = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    shards = permute(np.arange(len(sizes)), len(sizes), permutation=key(SHARDS, seed, epoch))
    starts = np.concatenate([[0], np.cumsum(sizes[shards])])  # (S + 1,)
    windows = [0]
    while windows[-1] < starts[-1]:
        last_shard = int(np.searchsorted(starts, min(windows[-1] + shuffle_window, int(starts[-1]))))
        windows.append(int(starts[last_shard]))
    return EpochOrder(shards, starts, first_rows[shards], np.asarray(windows, np.int64))


def samples_at(positions: Samples, order: EpochOrder, *, seed: int, epoch: int) -> Samples:
    """Return the samples at these positions of the epoch: (N,) -> (N,). Each shuffle window permutes its own."""
    shuffled = np.empty_like(positions)
    window_of = np.searchsorted(order.windows, positions, side="right") - 1  # (N,)
    for window in sorted(set(window_of.tolist())):
        inside = window_of == window
        start, end = order.windows[window], order.windows[window + 1]
        permutation = key(WINDOW, seed, epoch, window)
        shuffled[inside] = start + permute(positions[inside] - start, int(end - start), permutation=permutation)
    place = np.searchsorted(order.starts, shuffled, side="right") - 1  # (N,) place of the shard in the epoch
    return order.rows[place] + shuffled - order.starts[place]


@dataclass(frozen=True)
class TrainingPlan:
    """The samples that one rank trains on: over all ranks, every sample of the split once per epoch.

    An epoch drops its last, incomplete global batch, other samples each time. `limit` shortens it to that number of
    batches per rank. Raises: ValueError when the split has fewer samples than one global batch.
    """

    shard_samples: tuple[int, ...]
    seed: int
    shuffle_window: int
    batch_size: int  # of one rank and one step
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1
    limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "shuffle_window"):
            require(getattr(self, name) >= 1, "must be at least 1", **{name: getattr(self, name)})
        if self.num_steps == 0:
            images, size = sum(self.shard_samples), self.global_batch_size
            problem = f"{images} training images are fewer than a global batch of {size} ("
            batch_size, accumulate = ("batch_size", self.batch_size), ("accumulate", self.accumulate)
            advice = f" x {self.world_size} ranks): lower one of the two or use fewer devices"
            raise ArgumentError(problem, batch_size, " x ", accumulate, advice)

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer step, over all ranks."""
        return self.batch_size * self.accumulate * self.world_size

    @property
    def largest_batch(self) -> int:
        """Samples in every batch."""
        return self.batch_size

    @property
    def num_steps(self) -> int:
        """Batches of one rank in an epoch; `accumulate` of them make an optimizer step."""
        complete = sum(self.shard_samples) // self.global_batch_size * self.accumulate
        return complete if self.limit is None else min(self.limit, complete)

    def window(self, epoch: int, step: int) -> int:
        """Return the shuffle window in which a step begins, the same for all ranks."""
        first = step * self.world_size * self.batch_size
        return int(np.searchsorted(self._order(epoch).windows, first, side="right")) - 1

    def coming_shards(self, epoch: int, window: int) -> list[int]:
        """Return the shards of the steps that begin in a shuffle window, then those of the window that follows."""
        order, size = self._order(epoch), self.world_size * self.batch_size
        following = -(-int(order.windows[window + 1]) // size)  # the first step that begins after the window
        ends_epoch = following >= self.num_steps
        last = self.window(epoch, self.num_steps - 1 if ends_epoch else following)
        end = max(int(order.windows[last + 1]), min(following, self.num_steps) * size)
        places = np.searchsorted(order.starts, [order.windows[window], end])
        shards: list[int] = order.shards[slice(*places)].tolist()
        if ends_epoch:
            following_order = self._order(epoch + 1)
            first_window = np.searchsorted(following_order.starts, following_order.windows[1])
            shards += following_order.shards[:first_window].tolist()
        return list(dict.fromkeys(shards))

    def samples(self, epoch: int, step: int) -> Samples:
        """Return this rank's samples of a step: (batch_size,) rows of the index."""
        order = self._order(epoch)
        # Micro-batches are cut from the order like batches: `accumulate` consecutive ones are one global batch.
        first = (step * self.world_size + self.rank) * self.batch_size
        return samples_at(np.arange(first, first + self.batch_size), order, seed=self.seed, epoch=epoch)

    def _order(self, epoch: int) -> EpochOrder:
        return epoch_order(self.shard_samples, seed=self.seed, epoch=epoch, shuffle_window=self.shuffle_window)


@dataclass(frozen=True)
class EvaluationPlan:
    """The samples that one rank evaluates: over all ranks, every sample of the split exactly once, in index order.

    Slices for all steps and ranks differ by one sample at most, so that all ranks take the same number of steps and
    none is empty. Raises: ValueError when there are more ranks than samples.
    """

    num_samples: int
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "must be at least 1", batch_size=self.batch_size)
        if self.world_size > self.num_samples:
            images = f"the {self.num_samples} images to evaluate"
            raise ValueError(f"{self.world_size} ranks are more than {images}: use fewer devices")

    @property
    def largest_batch(self) -> int:
        """Samples in the largest batch of any rank: `batch_size` at most, or 2 where 1 is impossible."""
        return -(-self.num_samples // (self.num_steps * self.world_size))

    @property
    def num_steps(self) -> int:
        """Batches per rank, the same for all."""
        return min(-(-self.num_samples // (self.batch_size * self.world_size)), self.num_samples // self.world_size)

    def samples(self, epoch: int, step: int) -> Samples:
        """Return this rank's samples of a step, the same in every epoch: (n,) rows of the index, n at least 1."""
        number, count = step * self.world_size + self.rank, self.num_steps * self.world_size
        return np.arange(number * self.num_samples // count, (number + 1) * self.num_samples // count)


@dataclass(frozen=True)
class StridedPlan:
    """Every `world_size`-th batch of a plan for one process, from the `rank`-th on.

    The batches are the same for any number of ranks, and so are the bits of what is computed from each. A rank may have
    no batch, one more or one fewer than another.
    """

    plan: EvaluationPlan
    rank: int
    world_size: int

    @property
    def largest_batch(self) -> int:
        """Samples in the largest batch."""
        return self.plan.largest_batch

    @property
    def num_steps(self) -> int:
        """Batches of this rank."""
        return len(range(self.rank, self.plan.num_steps, self.world_size))

    def samples(self, epoch: int, step: int) -> Samples:
        """Return this rank's samples of a step: (n,) rows of the index."""
        return self.plan.samples(epoch, step * self.world_size + self.rank)


Plan = TrainingPlan | EvaluationPlan | StridedPlan
