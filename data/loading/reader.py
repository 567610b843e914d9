"""From a plan to encoded batches, read ahead from the shards by background threads."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.draws import Samples
from data.loading.crops import CropPolicy, CropWindows
from data.loading.order import Plan, Position
from data.loading.storage import Storage
from data.shards.dataset import Index

THREADS = 4


class EncodedBatch(NamedTuple):
    """A batch before decoding."""

    buffer: NDArray[np.uint8]
    images: list[NDArray[np.uint8]]  # encoded, each a part of the buffer
    crops: CropWindows
    labels: NDArray[np.int64]
    samples: Samples


class BatchReader:
    """Reads the batches of a plan in order, a few of them ahead.

    Reader threads run `_read`: they pop `_buffers`, share index and storage. All else belongs to the caller's thread.
    """

    def __init__(self, index: Index, storage: Storage, *, plan: Plan, crop: CropPolicy, seed: int) -> None:
        self.index, self.storage = index, storage
        self.plan, self.crop, self.seed = plan, crop, seed
        self._next = Position(0, 0)
        self._reading: deque[Future[EncodedBatch]] = deque()
        # Buffers of decoded batches: fresh memory would cost a page fault for every 4 KB of every image.
        self._buffers: deque[NDArray[np.uint8]] = deque()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="shard-reader")

    def start(self, position: Position, *, readahead: int) -> None:
        """Discard all batches and read from `position` on, `readahead` batches ahead."""
        for batch in self._reading:
            batch.cancel()
        self._reading.clear()
        self._next = position
        for _ in range(readahead):
            self._submit()

    def take(self) -> EncodedBatch:
        """Return the next batch and start to read one more. Raises: ValueError, OSError for an unreadable shard."""
        batch = self._reading.popleft().result()
        self._submit()
        return batch

    def recycle(self, buffer: NDArray[np.uint8]) -> None:
        """Reuse the buffer of a batch that has been decoded."""
        self._buffers.append(buffer)

    def _submit(self) -> None:
        self._reading.append(self._threads.submit(self._read, self._next))
        self._next = self._next.following(self.plan.num_steps)

    def _read(self, position: Position) -> EncodedBatch:
        samples = self.plan.samples(*position)
        rows = self.index.rows(samples)
        ends = np.cumsum(rows.size)
        buffer = self._free_buffer(int(ends[-1]))
        images = np.split(buffer[: ends[-1]], ends[:-1])
        for shard, offset, image in zip(rows.shard.tolist(), rows.offset.tolist(), images, strict=True):
            self.storage.read(self.index.split.shards[shard].file, image, offset=offset)
        sizes = np.stack([rows.height, rows.width], axis=1).astype(np.int64)  # (N, 2)
        crops = self.crop.crops(sizes, samples, seed=self.seed, epoch=position.epoch)
        return EncodedBatch(buffer, images, crops, rows.label.astype(np.int64), samples)

    def _free_buffer(self, size: int) -> NDArray[np.uint8]:
        """Return a buffer of at least `size` bytes, a recycled one if possible."""
        try:
            buffer = self._buffers.popleft()
        except IndexError:
            return np.empty(size, np.uint8)
        return buffer if len(buffer) >= size else np.empty(size + size // 4, np.uint8)
