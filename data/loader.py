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
    def batch_size(self) -> int:
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

    def read(self, file: str, offset: int, size: int) -> NDArray[np.uint8]:
        """Return exactly `size` bytes. Raises: ValueError, OSError naming the file."""


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

    def read(self, file: str, offset: int, size: int) -> NDArray[np.uint8]:
        """Return `size` bytes from `offset`. Raises: ValueError when the file ends before them."""
        shard = self._open(self.root / file)  # held until it is read: the cache may let go of it meanwhile
        content = os.pread(shard.descriptor, size, offset)
        if len(content) != size:
            raise ValueError(f"{self.root / file} ends before byte {offset + size}: it changed after it was indexed")
        return np.frombuffer(content, np.uint8)


class _OpenFile:
    """A file descriptor that closes when the last reader lets it go, so that the cache may drop it at any time."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _Feed(NamedTuple):
    """One batch before it is decoded."""

    encoded: list[NDArray[np.uint8]]
    windows: Windows
    labels: NDArray[np.int64]
    samples: Samples


class Loader:
    """Batches of one plan, epoch after epoch.

    Reads ahead in threads, so iterate one epoch at a time. `wait_seconds` grows by the
    time a caller waited for batches.
    """

    def __init__(
        self, index: Index, storage: Storage, *, plan: Plan, view: View, decode: Decode, seed: int = 0
    ) -> None:
        self.index, self.storage = index, storage
        self.plan, self.view, self.decode, self.seed = plan, view, decode, seed
        self.wait_seconds = 0.0
        self._pipeline: Pipeline | None = None
        self._finished = True
        self._coming: deque[Future[_Feed]] = deque()
        self._decoding: deque[_Feed] = deque()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="shard-reader")

    def __len__(self) -> int:
        return self.plan.num_steps

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(epoch=0)

    def batches(self, *, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on.

        Raises: UnreadableImage naming shard and key of what cannot be decoded.
        """
        self._begin(epoch, start)
        for step in range(start, len(self)):
            began = time.perf_counter()
            batch = self._next()
            self.wait_seconds += time.perf_counter() - began
            if step == len(self) - 1:  # the caller may never ask again: what follows the last yield may not run
                self._finished = True
            yield batch

    def _begin(self, epoch: int, start: int) -> None:
        for future in self._coming:
            future.cancel()
        self._coming.clear()
        self._decoding.clear()
        self._steps = iter(range(start, len(self)))
        self._epoch = epoch
        if self._pipeline is None or not self._finished:  # an epoch left half-way leaves batches in the pipeline
            self._pipeline = self._build()
        else:
            self._pipeline.reset()
        self._finished = False
        for _ in range(self.decode.readahead):
            self._read_ahead()

    def _next(self) -> Batch:
        assert self._pipeline is not None
        try:
            (output,) = self._pipeline.run()
        except RuntimeError as error:
            self._pipeline = None
            raise self._explain(error) from error
        feed = self._decoding.popleft()
        images = torch.utils.dlpack.from_dlpack(output.as_tensor()).permute(
            0, 3, 1, 2
        )  # (N, H, W, 3) -> (N, 3, H, W), no copy
        return Batch(images, torch.from_numpy(feed.labels), torch.from_numpy(feed.samples))

    def _read_ahead(self) -> None:
        step = next(self._steps, None)
        if step is not None:
            self._coming.append(self._readers.submit(self._read, self._epoch, step))

    def _read(self, epoch: int, step: int) -> _Feed:
        samples = self.plan.samples(epoch, step)
        rows = self.index.rows(samples)
        files = [self.index.split.shards[shard].file for shard in rows.shard]
        encoded = [
            self.storage.read(file, offset, size)
            for file, offset, size in zip(files, rows.offset.tolist(), rows.size.tolist(), strict=True)
        ]
        sizes = np.stack([rows.height, rows.width], axis=1).astype(np.int64)  # (N, 2)
        windows = self.view.windows(sizes, samples, seed=self.seed, epoch=epoch)
        return _Feed(encoded, windows, rows.label.astype(np.int64), samples)

    def _hand_over(self) -> tuple[Any, ...]:
        """DALI's callback: the next batch's bytes and windows."""
        if not self._coming:
            raise StopIteration
        feed = self._coming.popleft().result()
        self._read_ahead()
        self._decoding.append(feed)
        return feed.encoded, *feed.windows

    def _build(self) -> Pipeline:
        decode, size = self.decode, self.view.image_size
        pipeline = Pipeline(
            batch_size=self.plan.batch_size,
            num_threads=decode.threads,
            device_id=decode.device_id,
            exec_dynamic=True,  # the other executor writes over batches that are still held
        )
        with pipeline:
            encoded, anchor, shape, roi_start, roi_end, mirror = fn.external_source(
                source=self._hand_over, num_outputs=6, batch=True
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

    epoch = 0
    step = 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches(epoch=self.epoch, start=self.step):
            self.step += 1
            if self.step == len(self):
                self.epoch, self.step = self.epoch + 1, 0
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
