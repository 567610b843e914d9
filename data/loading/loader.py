"""From a plan to batches: Python decides what is shown, DALI makes the images.

A few threads fetch the bytes of the coming batches by position; a callback hands
them to the graph of `decode.py`, together with the windows that `augment.py` has
drawn. All state is (epoch, step).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.utils.dlpack
from numpy.typing import NDArray
from nvidia.dali import Pipeline
from torch import Tensor

from data.loading.crops import View, Windows
from data.loading.graph import Decode, build_pipeline, can_decode
from data.loading.order import Samples
from data.shards.dataset import Index
from data.shards.images import UnreadableImage

OPEN_SHARDS = 256  # a quarter of the usual limit of open files
READERS = 4


class Batch(NamedTuple):
    """What a network is given: images float32 (N, 3, H, W) normalised, in channels_last memory; labels and
    samples int64 (N,), a sample being its row in the index."""

    images: Tensor
    labels: Tensor
    samples: Tensor


class Plan(Protocol):
    """Which samples a step holds; see `order.TrainingPlan` and `order.EvaluationPlan`."""

    @property
    def num_steps(self) -> int:
        """Batches in an epoch."""

    @property
    def largest_batch(self) -> int:
        """Samples in the largest batch."""

    def samples(self, epoch: int, step: int) -> Samples:
        """Rows of the index: (n,)."""


class Storage(Protocol):
    """Where shards lie: from a position to bytes. Called from several threads."""

    def read(self, file: str, into: NDArray[np.uint8], *, offset: int) -> None:
        """Fill `into` with the bytes from `offset` on. Raises: ValueError, OSError naming the file."""


class LocalShards:
    """Tars in a folder, read by position: a tar that shrinks is an error with a name, where a mapped one kills."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._open = lru_cache(maxsize=OPEN_SHARDS)(_OpenFile)

    def read(self, file: str, into: NDArray[np.uint8], *, offset: int) -> None:
        """Fill `into` with the bytes from `offset` on. Raises: ValueError when the file ends before them."""
        shard = self._open(self.root / file)  # held until it is read: the cache may let go of it meanwhile
        done = 0
        while done < len(into):  # a network file system may give less than it is asked for
            count = os.preadv(shard.descriptor, [into[done:].data], offset + done)
            if count == 0:
                end = offset + len(into)
                raise ValueError(f"{self.root / file} ends before byte {end}: it changed after it was indexed")
            done += count


class _OpenFile:
    """A file descriptor that closes when the last reader lets it go, so that the cache may drop it at any time."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _Feed(NamedTuple):
    """One batch before it is decoded."""

    buffer: NDArray[np.uint8]
    encoded: list[NDArray[np.uint8]]  # each image's part of the buffer
    windows: Windows
    labels: NDArray[np.int64]
    samples: Samples


class Loader:
    """Batches of one plan, pass after pass: each iteration is one pass over all of it.

    Passes follow each other without a gap: while the last batch of one is used, the
    first of the next are already decoded. Iterate one at a time. `wait_seconds` grows
    by the time the caller waited for batches.
    """

    def __init__(
        self, index: Index, storage: Storage, *, plan: Plan, view: View, decode: Decode, seed: int = 0
    ) -> None:
        self.index, self.storage = index, storage
        self.plan, self.view, self.decode, self.seed = plan, view, decode, seed
        self.epoch = 0
        self.wait_seconds = 0.0
        self._pipeline: Pipeline | None = None
        self._next_position = (-1, -1)  # epoch and step of the batch that the pipeline gives next
        self._coming: deque[Future[_Feed]] = deque()
        self._decoding: deque[_Feed] = deque()
        # Buffers of batches that are done: fresh memory would cost a page fault every 4 KB of every image.
        self._buffers: deque[NDArray[np.uint8]] = deque()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="shard-reader")

    def __len__(self) -> int:
        return self.plan.num_steps

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches(self.epoch, 0):
            if self._next_position[1] == 0:  # the caller may not come back after the last batch
                self.epoch += 1
            yield batch

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on.

        Raises: UnreadableImage naming shard and key of what cannot be decoded.
        """
        if self._pipeline is None or self._next_position != (epoch, start):
            self._begin(epoch, start)
        for step in range(start, len(self)):
            began = time.perf_counter()
            batch = self._next()
            self.wait_seconds += time.perf_counter() - began
            self._next_position = (epoch, step + 1) if step + 1 < len(self) else (epoch + 1, 0)
            yield batch

    def _begin(self, epoch: int, start: int) -> None:
        for future in self._coming:
            future.cancel()
        self._coming.clear()
        self._decoding.clear()
        self._positions = self._endless(epoch, start)
        self._next_position = (epoch, start)
        for _ in range(self.decode.readahead):
            self._read_ahead()
        self._pipeline = build_pipeline(
            self._hand_over, decode=self.decode, view=self.view, batch_size=self.plan.largest_batch
        )

    def _endless(self, epoch: int, start: int) -> Iterator[tuple[int, int]]:
        while True:
            for step in range(start, len(self)):
                yield epoch, step
            epoch, start = epoch + 1, 0

    def _next(self) -> Batch:
        assert self._pipeline is not None
        pipeline, self._pipeline = self._pipeline, None  # after an error of any kind the next pass builds a new one
        try:
            (output,) = pipeline.run()
        except RuntimeError as error:
            named = self._unreadable()
            if named is None:
                raise
            raise named from error
        self._pipeline = pipeline
        feed = self._decoding.popleft()
        self._buffers.append(feed.buffer)  # its batch is decoded, so DALI reads it no more
        images = torch.utils.dlpack.from_dlpack(output.as_tensor()).permute(
            0, 3, 1, 2
        )  # (N, H, W, 3) -> (N, 3, H, W), no copy
        return Batch(images, torch.from_numpy(feed.labels), torch.from_numpy(feed.samples))

    def _read_ahead(self) -> None:
        self._coming.append(self._readers.submit(self._read, *next(self._positions)))

    def _read(self, epoch: int, step: int) -> _Feed:
        samples = self.plan.samples(epoch, step)
        rows = self.index.rows(samples)
        ends = np.cumsum(rows.size)
        buffer = self._free_buffer(int(ends[-1]))
        encoded = np.split(buffer[: ends[-1]], ends[:-1])
        for shard, offset, image in zip(rows.shard.tolist(), rows.offset.tolist(), encoded, strict=True):
            self.storage.read(self.index.split.shards[shard].file, image, offset=offset)
        sizes = np.stack([rows.height, rows.width], axis=1).astype(np.int64)  # (N, 2)
        windows = self.view.windows(sizes, samples, seed=self.seed, epoch=epoch)
        return _Feed(buffer, encoded, windows, rows.label.astype(np.int64), samples)

    def _free_buffer(self, size: int) -> NDArray[np.uint8]:
        """A buffer of `size` bytes or more, one of a batch that is done where there is one."""
        try:
            buffer = self._buffers.popleft()
        except IndexError:
            return np.empty(size, np.uint8)
        return buffer if len(buffer) >= size else np.empty(size + size // 4, np.uint8)

    def _hand_over(self) -> tuple[Any, ...]:
        """DALI's callback: the next batch's bytes and windows."""
        feed = self._coming.popleft().result()
        self._read_ahead()
        self._decoding.append(feed)
        return feed.encoded, *(array for array in feed.windows if array is not None)

    def _unreadable(self) -> UnreadableImage | None:
        """Name the images in flight that cannot be decoded; DALI names none and loses the whole batch."""
        broken = [
            sample
            for feed in self._decoding
            for encoded, sample in zip(feed.encoded, feed.samples.tolist(), strict=True)
            if not can_decode(encoded, self.decode.device_id)
        ]
        if not broken:
            return None
        names = ", ".join(self.index.keys(broken[:3])) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
        return UnreadableImage(
            f"cannot be decoded: {names} (it changed after it was packed or indexed: pack again, or remove the index)"
        )


class TrainingLoader(Loader):
    """A loader that remembers where it is: each iteration goes on at `(epoch, step)`, and both can be saved and set.

    The state is that of the next batch, so it is right whether or not the caller ever
    exhausts the iterator.
    """

    step = 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches(self.epoch, self.step):
            self.epoch, self.step = self._next_position
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The position of the next batch."""
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at a position that `state_dict` returned."""
        self.epoch, self.step = state["epoch"], state["step"]
