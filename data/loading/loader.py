"""From a plan to batches of images: `BatchReader` reads the bytes, the DALI graph of `graph.py` decodes them."""

import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.utils.dlpack
from nvidia.dali import Pipeline
from torch import Tensor

from data.loading.crops import CropPolicy
from data.loading.graph import DecodeSettings, build_pipeline, can_decode, choose_resizer
from data.loading.order import Plan, Position
from data.loading.reader import BatchReader, EncodedBatch
from data.loading.storage import Storage
from data.shards.dataset import Index
from data.shards.images import UnreadableImage

NAMED = 3  # damaged images in an error


class Batch(NamedTuple):
    """The input of a network, and the rows of the index from which it was made."""

    images: Tensor  # (N, 3, H, W) float32, normalised, in channels_last memory
    labels: Tensor  # (N,) int64
    samples: Tensor  # (N,) int64


class Loader:
    """The batches of a plan; each iteration is one epoch from its first step. Iterate one at a time.

    Epochs follow each other without a gap: while the last batch of one is used, the first of the next are already
    decoded. `position` is that of the next batch, `wait_seconds` the time that the caller has waited for batches.

    Threads; the callback `_encoded` runs on the caller's thread, inside `pipeline.run`:
        caller's thread   position, _pipeline; pops _decoding, recycles buffers
        DALI callback     pops the reader's _reading, submits the next read; appends to _decoding
        reader threads    complete the futures in _reading; pop the reader's _buffers
        DALI's threads    read the buffers of the batches in _decoding
    """

    def __init__(
        self, index: Index, storage: Storage, *, plan: Plan, crop: CropPolicy, decode: DecodeSettings, seed: int = 0
    ) -> None:
        self.index, self.plan, self.crop, self.decode = index, plan, crop, decode
        self.position = Position(0, 0)
        self.wait_seconds = 0.0
        self._reader = BatchReader(index, storage, plan=plan, crop=crop, seed=seed)
        self._decoding: deque[EncodedBatch] = deque()
        self._pipeline: Pipeline | None = None  # its next batch is that at `position`

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
        self._reader.start(self.position, readahead=self.decode.readahead)
        decode, crop, batch_size = self.decode, self.crop, self.plan.largest_batch
        resizer = choose_resizer(decode, crop)
        self._pipeline = build_pipeline(self._encoded, decode=decode, crop=crop, batch_size=batch_size, resizer=resizer)

    def _encoded(self) -> tuple[Any, ...]:
        """Hand DALI the next batch: its encoded images, then the arrays of its crops."""
        batch = self._reader.take()
        self._decoding.append(batch)
        return batch.images, *(array for array in batch.crops if array is not None)

    def _decode_next(self) -> Batch:
        assert self._pipeline is not None
        pipeline, self._pipeline = self._pipeline, None  # after any error the next iteration builds a new one
        try:
            (output,) = pipeline.run()
        except RuntimeError as error:
            self._raise_damaged(error)
            raise
        self._pipeline = pipeline
        encoded = self._decoding.popleft()
        self._reader.recycle(encoded.buffer)
        # (N, H, W, 3) -> (N, 3, H, W), no copy
        images = torch.utils.dlpack.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)
        return Batch(images, torch.from_numpy(encoded.labels), torch.from_numpy(encoded.samples))

    def _raise_damaged(self, error: RuntimeError) -> None:
        """Raise UnreadableImage if images in flight cannot be decoded; DALI names none and loses the entire batch."""
        damaged = [
            sample
            for batch in self._decoding
            for image, sample in zip(batch.images, batch.samples.tolist(), strict=True)
            if not can_decode(image, self.decode)
        ]
        if damaged:
            more = f" and {len(damaged) - NAMED} more" if len(damaged) > NAMED else ""
            raise UnreadableImage(
                f"cannot be decoded: {', '.join(self.index.keys(damaged[:NAMED]))}{more} "
                "(changed after packing or indexing: pack again, or remove the index)"
            ) from error


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
