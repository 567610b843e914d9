"""From a plan to batches: Python decides what is shown, DALI decodes, resizes and normalises it.

A few threads fetch the bytes of the coming batches by position; a callback hands
them to one DALI graph, the same for CPU and GPU, together with the windows that
`augment.py` has drawn. All state is (epoch, step).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.utils.dlpack
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from data.augment import Windows
from data.dataset import Index
from data.images import UnreadableImage
from data.order import Samples

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


class View(Protocol):
    """Which part of each image is shown; see `augment.TrainingView` and `augment.EvaluationView`."""

    @property
    def image_size(self) -> int:
        """Side of the square output in pixels."""

    def windows(self, sizes: NDArray[np.int64], samples: Samples, *, seed: int, epoch: int) -> Windows:
        """A window an image."""


class Storage(Protocol):
    """Where shards lie: from a position to bytes. Called from several threads."""

    def read(self, file: str, offset: int, into: NDArray[np.uint8]) -> None:
        """Fill `into` with the bytes from `offset` on. Raises: ValueError, OSError naming the file."""


@dataclass(frozen=True)
class Decode:
    """How batches are made: mean and standard deviation as fractions of 255, and where.

    `device_id` is the GPU that decodes, None the CPU; `threads` are DALI's;
    `readahead` batches are fetched before they are asked for.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device_id: int | None = None
    threads: int = 2
    readahead: int = 4


class LocalShards:
    """Tars in a folder, read by position: a tar that shrinks is an error with a name, where a mapped one kills."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._open = lru_cache(maxsize=OPEN_SHARDS)(_OpenFile)

    def read(self, file: str, offset: int, into: NDArray[np.uint8]) -> None:
        """Fill `into` with the bytes from `offset` on. Raises: ValueError when the file ends before them."""
        shard = self._open(self.root / file)  # held until it is read: the cache may let go of it meanwhile
        if os.preadv(shard.descriptor, [into.data], offset) != len(into):
            raise ValueError(
                f"{self.root / file} ends before byte {offset + len(into)}: it changed after it was indexed"
            )


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
        self._pipeline = self._build()

    def _endless(self, epoch: int, start: int) -> Iterator[tuple[int, int]]:
        while True:
            for step in range(start, len(self)):
                yield epoch, step
            epoch, start = epoch + 1, 0

    def _next(self) -> Batch:
        assert self._pipeline is not None
        try:
            (output,) = self._pipeline.run()
        except RuntimeError as error:
            self._pipeline = None
            raise self._explain(error) from error
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
            self.storage.read(self.index.split.shards[shard].file, offset, image)
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
        return feed.encoded, *feed.windows

    def _build(self) -> Pipeline:
        decode, size = self.decode, self.view.image_size
        pipeline = Pipeline(
            batch_size=self.plan.largest_batch,
            num_threads=decode.threads,
            device_id=decode.device_id,
            exec_dynamic=True,  # the other executor writes over batches that are still held
        )
        with pipeline:
            encoded, anchor, shape, roi_start, roi_end, mirror = fn.external_source(
                source=self._hand_over, num_outputs=6, batch=True, no_copy=True
            )
            decoded = fn.decoders.image_slice(
                encoded,
                anchor,
                shape,
                axis_names="HW",
                device="cpu" if decode.device_id is None else "mixed",
                output_type=types.DALIImageType.RGB,
            )
            resized = fn.resize(
                decoded,
                size=[size, size],
                roi_start=roi_start,
                roi_end=roi_end,
                interp_type=types.DALIInterpType.INTERP_LINEAR,
                antialias=True,
            )
            images = fn.crop_mirror_normalize(
                resized,
                mirror=mirror,
                mean=[value * 255 for value in decode.mean],
                std=[value * 255 for value in decode.std],
                dtype=types.DALIDataType.FLOAT,
                output_layout="HWC",
            )
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline

    def _explain(self, error: RuntimeError) -> Exception:
        """Name the images in flight that cannot be decoded; DALI names none and loses the whole batch."""
        broken = [
            sample
            for feed in self._decoding
            for encoded, sample in zip(feed.encoded, feed.samples.tolist(), strict=True)
            if not _decodes(encoded, self.decode.device_id)
        ]
        if not broken:
            return error
        names = ", ".join(self.index.keys(broken[:3])) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
        return UnreadableImage(f"cannot be decoded: {names} (leave it out by packing the images again)")


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


def _decodes(encoded: NDArray[np.uint8], device_id: int | None) -> bool:
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=device_id)
    with pipeline:
        source = fn.external_source(source=lambda: [encoded], batch=True)
        device = "cpu" if device_id is None else "mixed"
        pipeline.set_outputs(fn.decoders.image(source, device=device, output_type=types.DALIImageType.RGB))
    try:
        pipeline.run()
    except RuntimeError:
        return False
    return True
