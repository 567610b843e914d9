"""From decoded crops in the host's memory to normalised batches on a device."""

import torch
from torch import Tensor

NUM_BUFFERS = 2  # one is filled while the other is copied


class Transfer:
    """Copy uint8 crops to a device and normalise them there: (N, H, W, 3) -> float32 (N, 3, H, W), channels_last.

    A quarter of the bytes of normalised floats cross the bus. On a GPU the copy and the arithmetic run on a stream
    beside that of the training, so that the next batch arrives while the current one trains.

    The result is (x - mean) * (1 / std) in two roundings, to the bit what DALI computes on a CPU.
    """

    def __init__(self, device: torch.device, *, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self._device = device
        self._mean = torch.tensor([value * 255 for value in mean]).to(device)  # (3,)
        self._inverse_std = (1 / torch.tensor([value * 255 for value in std])).to(device)  # (3,)
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        # Pinned memory and the end of its last copy, by turns.
        self._buffers: list[tuple[Tensor, torch.cuda.Event]] = []

    def __call__(self, crops: Tensor) -> Tensor:
        """Return the batch; on a GPU at once, ordered before whatever the current stream does next."""
        if self._stream is None:
            return self._normalize(crops)
        training = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            images = self._normalize(self._upload(crops))
        training.wait_stream(self._stream)
        images.record_stream(training)  # its memory returns to this stream only when the training is done with it
        return images

    def _upload(self, crops: Tensor) -> Tensor:
        if len(self._buffers) < NUM_BUFFERS:
            buffer = torch.empty_like(crops, pin_memory=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        else:
            buffer, copied = self._buffers.pop(0)
            copied.synchronize()
        if len(buffer) < len(crops):
            buffer = torch.empty_like(crops, pin_memory=True)
        pinned = buffer[: len(crops)].copy_(crops)
        uploaded = pinned.to(self._device, non_blocking=True)
        copied.record()
        self._buffers.append((buffer, copied))
        return uploaded

    def _normalize(self, crops: Tensor) -> Tensor:
        images = torch.sub(crops, self._mean).mul_(self._inverse_std)  # uint8 (N, H, W, 3) -> float32
        return images.permute(0, 3, 1, 2)  # -> (N, 3, H, W), no copy
