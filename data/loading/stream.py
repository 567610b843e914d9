"""Images from anywhere, decoded as an evaluation decodes them; one that cannot be decoded does not end the stream."""

import itertools
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.augment.augmentation import Augmentation
from data.augment.crops import CropPolicy, height_and_width
from data.loading.decoder import DecodeSettings
from data.loading.graph import as_torch, build_pipeline, can_decode
from data.loading.inputs import Source
from data.loading.transfer import Transfer
from data.shards.images import oriented_size
from data.storage.local import wait_for


class DecodedBatch(NamedTuple):
    """Images in the order of their sources, those with an error left out."""

    names: list[str]  # of all
    errors: list[str | None]  # of all; None: decoded
    images: Tensor  # (N, 3, H, W) float32, normalised, N the number without an error


class _Entry:
    """An image on its way; `error` is set when it cannot be read or decoded."""

    def __init__(self, source: Source) -> None:
        self.name, self.size = source.name, (0, 0)
        self.error: str | None = None
        self.encoded: NDArray[np.uint8] = np.empty(0, np.uint8)
        try:
            encoded = source.read()
            self.size = oriented_size(encoded)
            self.encoded = np.frombuffer(encoded, np.uint8)
        except (OSError, ValueError) as error:
            self.error = _reason(error)


class ImageStream:
    """Decode `sources` in their order, in batches of at most `batch_size`. Iterate once.

    Threads read ahead; DALI decodes while the caller works. A damaged image makes DALI lose its batch, which is then
    decoded again without it.
    """

    def __init__(self, sources: Iterable[Source], *, crop: CropPolicy, decode: DecodeSettings, batch_size: int) -> None:
        self._sources, self._crop, self._decode, self._batch_size = iter(sources), crop, decode, batch_size
        self._threads = ThreadPoolExecutor(decode.io_threads, thread_name_prefix="image-reader")
        self._reading: deque[Future[_Entry]] = deque()
        self._again: deque[list[_Entry]] = deque()  # to be decoded before what is read next
        self._decoding: deque[list[_Entry]] = deque()
        self._left: list[_Entry] = []  # unreadable ones behind the last batch
        device = torch.device("cpu" if decode.device_id is None else f"cuda:{decode.device_id}")
        self._transfer = Transfer(device, mean=decode.mean, std=decode.std) if decode.crops_only else None

    def __iter__(self) -> Iterator[DecodedBatch]:
        """Yield batches until the sources end. Raises: RuntimeError that no image explains."""
        with self._threads:
            more = True
            while more:
                more = yield from self._decode_until_damage()
            if self._left:
                yield self._finished(self._left, torch.empty(0, 3, *height_and_width(self._crop.image_size)))

    def _decode_until_damage(self) -> Generator[DecodedBatch, None, bool]:
        """Yield batches; return whether some have to be decoded again."""
        augment = Augmentation(self._crop)
        pipeline = build_pipeline(self._inputs, decode=self._decode, augment=augment, batch_size=self._batch_size)
        while True:
            try:
                (output,) = pipeline.run()
            except StopIteration:
                return False
            except RuntimeError:
                if not self._find_damage():
                    raise
                self._again.extend(self._decoding)
                self._decoding.clear()
                if self._left:  # they follow those that are decoded again
                    self._again.append(self._left)
                    self._left = []
                return True
            decoded = as_torch(output)  # (N, H, W, 3)
            images = self._transfer(decoded) if self._transfer else decoded.permute(0, 3, 1, 2)
            yield self._finished(self._decoding.popleft(), images)

    def _finished(self, entries: list[_Entry], images: Tensor) -> DecodedBatch:
        return DecodedBatch([one.name for one in entries], [one.error for one in entries], images)

    def _inputs(self) -> tuple[Any, ...]:
        """Hand DALI the next batch. Raises: StopIteration at the end."""
        entries = self._next_entries()
        self._decoding.append(entries)
        sound = [one for one in entries if one.error is None]
        sizes = np.array([one.size for one in sound], np.int64)
        crops = self._crop.crops(sizes, np.arange(len(sound)), seed=0, epoch=0)
        return [one.encoded for one in sound], *(array for array in crops if array is not None)

    def _next_entries(self) -> list[_Entry]:
        """Return the next images, at least one of which seems sound."""
        entries: list[_Entry] = []
        while self._again:
            entries += self._again.popleft()
            if any(one.error is None for one in entries):
                return entries
        num_sound = 0
        for entry in self._read_ahead():
            entries.append(entry)
            num_sound += entry.error is None
            if num_sound == self._batch_size:
                break
        if num_sound == 0:
            self._left += entries
            raise StopIteration
        return entries

    def _read_ahead(self) -> Iterator[_Entry]:
        while True:
            wanted = self._batch_size * (self._decode.readahead + 1) - len(self._reading)
            for source in itertools.islice(self._sources, wanted):
                self._reading.append(self._threads.submit(_Entry, source))
            if not self._reading:
                return
            yield wait_for(self._reading.popleft())

    def _find_damage(self) -> bool:
        """Set the errors of images in flight that the CPU cannot decode; return whether there are any."""
        sound = [one for entries in self._decoding for one in entries if one.error is None]
        damaged = [one for one in sound if not can_decode(one.encoded, reach=one.size)]
        for one in damaged:
            one.error = "it cannot be decoded"
        return bool(damaged)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
