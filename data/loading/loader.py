"""From a plan to batches of images: threads read the bytes ahead, the DALI graph of `graph.py` decodes them."""

import re
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline
from torch import Tensor

from data.augment.augmentation import Augmentation, DrawnBatch
from data.draws import Samples
from data.loading.decoder import DecodeSettings
from data.loading.graph import as_torch, build_pipeline, can_decode
from data.loading.order import Plan, Position, TrainingPlan
from data.loading.transfer import Transfer
from data.shards.dataset import Index
from data.shards.images import UnreadableImage
from data.storage.local import Request, Storage, wait_for

NAMED = 3  # damaged images in an error
JPEG_START, JPEG_SCAN, JPEG_END, JPEG_TAIL = b"\xff\xd8", b"\xff\xda", b"\xff\xd9", 512
SCARCE_MEMORY = 256 * 2**20  # bytes that are free on a GPU, with which a decoder may have failed for want of more
# DALI's messages about images; only the first one names one, by its number in the batch.
UNDECODED = re.compile(r"Failed to decode sample #(\d+)|nvImageCodec failure|cropping window|out of bounds")
OUT_OF_MEMORY = re.compile(r"CUDA allocation failed|Can't allocate \d+ bytes on device|CUDA error: out of memory")


class Batch(NamedTuple):
    """The input of a network, and the rows of the index from which it was made."""

    images: Tensor  # (N, 3, H, W) float32, normalised, in channels_last memory
    labels: Tensor  # (N,) int64
    samples: Tensor  # (N,) int64


class EncodedBatch(NamedTuple):
    """A batch before decoding."""

    buffer: NDArray[np.uint8]
    images: list[NDArray[np.uint8]]  # encoded, each a part of the buffer
    drawn: DrawnBatch
    labels: NDArray[np.int64]

    @property
    def samples(self) -> Samples:
        """Their rows of the index."""
        return self.drawn.samples

    def inputs(self, *, with_operations: bool) -> tuple[Any, ...]:
        """Return the encoded images, then the arrays of their crops and, where the graph applies them, operations."""
        operations = self.drawn.operations if with_operations else None
        return self.images, *(array for array in self.drawn.crops if array is not None), *(operations or ())


class Loader:
    """The batches of a plan; each iteration is one epoch from its first step. Iterate one at a time.

    Epochs follow each other without a gap: while the last batch of one is used, the first of the next are already
    decoded. `position` is that of the next batch, `wait_seconds` the time that the caller has waited for batches.

    Threads; the callback `_encoded` runs on the caller's thread, inside `pipeline.run`:
        caller's thread   position, _pipeline, _transfer; pops _decoding, appends to _buffers
        DALI callback     advances _batches, which submits reads and sets _window; appends to _decoding
        reader threads    run `_read`: pop _buffers, share index and storage, add to _complete
        DALI's threads    read the buffers of the batches in _decoding
    """

    def __init__(
        self,
        index: Index,
        storage: Storage,
        *,
        plan: Plan,
        augment: Augmentation,
        decode: DecodeSettings,
        seed: int = 0,
    ) -> None:
        self.index, self.plan, self.augment, self.decode = index, plan, augment, decode
        self.position, self.wait_seconds = Position(0, 0), 0.0
        self._storage, self._seed = storage, seed
        self._threads = ThreadPoolExecutor(decode.io_threads, thread_name_prefix="shard-reader")
        # Buffers of decoded batches: fresh memory would cost a page fault for every 4 KB of every image. A batch that
        # `run` has returned needs its buffer no more, because `run` waits on the host; with a stream it would not.
        self._buffers: deque[NDArray[np.uint8]] = deque()
        self._decoding: deque[EncodedBatch] = deque()
        self._batches: Iterator[EncodedBatch] = iter(())
        self._pipeline: Pipeline | None = None  # its next batch is that at `position`
        self._transfer: Transfer | None = None
        self._window: tuple[int, int] | None = None  # epoch and shuffle window that the storage expects
        self._complete: set[int] = set()  # samples that look unfinished, but decode

    def __len__(self) -> int:
        return self.plan.num_steps

    def __iter__(self) -> Iterator[Batch]:
        self._seek(Position(self.position.epoch, 0))
        yield from self._rest_of_epoch()

    def _seek(self, position: Position) -> None:
        if position != self.position:
            self.position, self._pipeline = position, None

    def _rest_of_epoch(self) -> Iterator[Batch]:
        """Yield the batches from `position` on. Raises: UnreadableImage naming shard and key of damaged images."""
        if self._pipeline is None:
            self._start()
        for _ in range(self.position.step, len(self)):
            start = time.perf_counter()
            batch = self._decode_next()
            self.wait_seconds += time.perf_counter() - start
            self.position = self.position.following(len(self))  # before the yield: the caller may not come back
            yield batch

    def _start(self) -> None:
        self._decoding.clear()
        self._batches = self._read_ahead(self.position)
        decode = self.decode
        with self._explained_errors():
            if decode.crops_only and self._transfer is None:
                device = torch.device("cpu" if decode.device_id is None else f"cuda:{decode.device_id}")
                self._transfer = Transfer(device, mean=decode.mean, std=decode.std)
            self._pipeline = build_pipeline(
                self._encoded, decode=decode, augment=self.augment, batch_size=self.plan.largest_batch
            )

    def first_inputs(self) -> tuple[Any, ...]:
        """Return what DALI is handed for the first batch, without a change of the position."""
        return self._inputs(self._read(Position(0, 0)))

    def _encoded(self) -> tuple[Any, ...]:
        """Hand DALI the next batch."""
        batch = next(self._batches)
        self._decoding.append(batch)
        return self._inputs(batch)

    def _inputs(self, batch: EncodedBatch) -> tuple[Any, ...]:
        return batch.inputs(with_operations=not self.decode.crops_only)  # otherwise `_transfer` applies them

    def _read_ahead(self, position: Position) -> Iterator[EncodedBatch]:
        """Yield the batches from `position` on; `readahead` more are being read. Raises: ValueError, OSError."""
        reading: deque[Future[EncodedBatch]] = deque()
        try:
            while True:
                while len(reading) <= self.decode.readahead:
                    self._expect_shards(position)
                    reading.append(self._threads.submit(self._read, position))
                    position = position.following(len(self))
                yield wait_for(reading.popleft())
        finally:
            for batch in reading:
                batch.cancel()

    def _expect_shards(self, position: Position) -> None:
        """Name the storage the shards of the shuffle window at a position and of the next, when a window begins."""
        if isinstance(self.plan, TrainingPlan):
            window = position.epoch, self.plan.window(*position)
            if window != self._window:
                self._window = window
                shards = self.plan.coming_shards(*window)
                self._storage.expect([self.index.split.shards[shard].file for shard in shards])

    def _read(self, position: Position) -> EncodedBatch:
        samples = self.plan.samples(*position)
        rows = self.index.rows(samples)
        ends = np.cumsum(rows.size)
        buffer = self._free_buffer(int(ends[-1]))
        images = np.split(buffer[: ends[-1]], ends[:-1])
        files = [self.index.split.shards[shard].file for shard in rows.shard.tolist()]
        self._storage.read_batch(list(map(Request, files, rows.offset.tolist(), images)))
        sizes = np.stack([rows.height, rows.width], axis=1).astype(np.int64)  # (N, 2)
        drawn = self.augment.draw(sizes, samples, seed=self._seed, epoch=position.epoch)
        batch = EncodedBatch(buffer, images, drawn, rows.label.astype(np.int64))
        if self.decode.gpu_decoder is not None:
            self._check_ends(batch)
        return batch

    def _free_buffer(self, size: int) -> NDArray[np.uint8]:
        try:
            buffer = self._buffers.popleft()
        except IndexError:
            return np.empty(size, np.uint8)
        return buffer if len(buffer) >= size else np.empty(size + size // 4, np.uint8)

    def _decode_next(self) -> Batch:
        assert self._pipeline is not None
        pipeline, self._pipeline = self._pipeline, None  # after any error the next iteration builds a new one
        with self._explained_errors():
            (output,) = pipeline.run()
        self._pipeline = pipeline
        encoded = self._decoding.popleft()
        self._buffers.append(encoded.buffer)
        decoded = as_torch(output)  # (N, H, W, 3)
        with self._explained_errors():
            if self._transfer:
                images = self._transfer(decoded, encoded.drawn)
            else:
                images = decoded.permute(0, 3, 1, 2)  # (N, 3, H, W), no copy
                encoded.drawn.erase(images)
        return Batch(images, torch.from_numpy(encoded.labels), torch.from_numpy(encoded.samples))

    def _check_ends(self, batch: EncodedBatch) -> None:
        """Raise UnreadableImage naming JPEGs without an end, of which a GPU says nothing: it leaves the rest grey."""
        unfinished = [number for number, image in enumerate(batch.images) if _is_unfinished(image)]
        unknown = [number for number in unfinished if int(batch.samples[number]) not in self._complete]
        if damaged := _damaged_samples(batch, unknown):
            raise self._unreadable(damaged, "it ends early")
        self._complete.update(batch.samples[unknown].tolist())

    @contextmanager
    def _explained_errors(self) -> Iterator[None]:
        """Turn an error of DALI's about memory or about images in flight into one that says so.

        Raises: OutOfMemoryError; UnreadableImage naming the images that the CPU cannot decode either.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            of_gpu = isinstance(error, MemoryError) and self.decode.graph_device is not None
            if of_gpu or OUT_OF_MEMORY.search(str(error)):
                raise torch.OutOfMemoryError(str(error)) from error
            if isinstance(error, RuntimeError):
                self._raise_damaged(error)
            raise

    def _raise_damaged(self, error: RuntimeError) -> None:
        """DALI loses the entire batch, the oldest in flight, and names an image at most by its number."""
        message = UNDECODED.search(str(error))
        if message is None or not self._decoding:
            return
        oldest, numbers = self._decoding[0], None
        if message[1] is not None and int(message[1]) < len(oldest.images):
            numbers = [int(message[1])]
        failed = self._decoding if numbers is None else [oldest]
        found = (sample for batch in failed for sample in _damaged_samples(batch, numbers))
        damaged = list(dict.fromkeys(found))  # an image may be in two batches, one of the next epoch
        reason = "changed after packing or indexing, or not decoded by DALI: replace it, and pack or index again"
        if not damaged and numbers:
            if self._lacks_memory():
                raise torch.OutOfMemoryError(str(error)) from error
            damaged = oldest.samples[numbers].tolist()
            reason = "the CPU decodes it: data.decoder=cpu name=NAME, a new run"
        if damaged:
            raise self._unreadable(damaged, reason) from error

    def _lacks_memory(self) -> bool:
        device = self.decode.graph_device
        return device is not None and torch.cuda.mem_get_info(device)[0] < SCARCE_MEMORY

    def _unreadable(self, damaged: list[int], reason: str) -> UnreadableImage:
        more = f" and {len(damaged) - NAMED} more" if len(damaged) > NAMED else ""
        names = ", ".join(self.index.keys(damaged[:NAMED])) + more
        return UnreadableImage(f"cannot be decoded: {names} ({reason})")


def _is_unfinished(image: NDArray[np.uint8]) -> bool:
    """Whether no end marker follows the start of a JPEG's last scan; bytes may follow it.

    A thumbnail has an end marker too, but before that start. The tail is searched first, which nearly always decides.
    """
    if image[:2].tobytes() != JPEG_START:
        return False
    parts = (part.tobytes() for part in (image[-JPEG_TAIL:], image))
    return all(part.rfind(JPEG_END) <= part.rfind(JPEG_SCAN) for part in parts)


def _damaged_samples(batch: EncodedBatch, numbers: list[int] | None) -> list[int]:
    """Return the samples with these numbers in a batch, or all, that a CPU cannot decode to the end of their crop."""
    reaches = (batch.drawn.crops.anchor + batch.drawn.crops.shape).tolist()
    return [
        int(batch.samples[number])
        for number in (range(len(batch.images)) if numbers is None else numbers)
        if not can_decode(batch.images[number], reach=tuple(reaches[number]))
    ]


class TrainingLoader(Loader):
    """A loader that continues: each iteration starts at `position`, which can be saved and restored at any time."""

    def __iter__(self) -> Iterator[Batch]:
        return self._rest_of_epoch()

    def state_dict(self) -> dict[str, int]:
        """Return the position of the next batch."""
        return self.position._asdict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a position that `state_dict` returned."""
        self._seek(Position(state["epoch"], state["step"]))
