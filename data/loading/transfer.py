"""From decoded crops to normalised batches on a device."""

import torch
from torch import Tensor

from data.augment.augmentation import DrawnBatch

NUM_BUFFERS = 2  # one is filled while the other is copied
MAX_HELD = 3  # batches of DALI's that wait for torch to have read them


class Transfer:
    """Copy uint8 crops to a device and normalise them there: (N, H, W, 3) -> float32 (N, 3, H, W), channels_last.

    Crops from the CPU cross the bus with a quarter of the bytes of floats. The copy and the arithmetic run on a stream
    beside that of the training, so that the next batch arrives while the current one trains. Crops on the GPU are held
    until torch has read them: DALI reuses released memory in the order of its own stream, not of torch's.

    The operations and erasing of a batch run there too. The result of the rest is (x - mean) * (1 / std) in two
    roundings, to the bit what DALI computes on a CPU.
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
        self._held: list[tuple[Tensor, torch.cuda.Event]] = []

    def __call__(self, crops: Tensor, drawn: DrawnBatch | None = None) -> Tensor:
        """Return the batch; on a GPU at once, ordered before whatever the current stream does next."""
        if self._stream is None:
            return self._finish(crops, drawn)
        if crops.is_cuda:
            images = self._finish(crops, drawn)
            self._hold(crops)
            return images
        training = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            images = self._finish(self._upload(crops), drawn)
        training.wait_stream(self._stream)
        images.record_stream(training)  # its memory returns to this stream only when the training is done with it
        return images

    def _hold(self, crops: Tensor) -> None:
        """Keep crops until the work that has been queued so far is done; let go of those whose work is."""
        read = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        read.record(torch.cuda.current_stream(self._device))
        self._held.append((crops, read))
        while len(self._held) > MAX_HELD or (self._held and _is_done(self._held[0][1])):
            self._held.pop(0)[1].synchronize()

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

    def _finish(self, crops: Tensor, drawn: DrawnBatch | None) -> Tensor:
        """Augment and normalise crops on the device."""
        if drawn is not None:
            drawn.apply_operations(crops)
        normalized = torch.sub(crops, self._mean).mul_(self._inverse_std)  # uint8 (N, H, W, 3) -> float32
        images = normalized.permute(0, 3, 1, 2)  # -> (N, 3, H, W), no copy
        if drawn is not None:
            drawn.erase(images)
        return images


def _is_done(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]  # torch leaves it untyped
