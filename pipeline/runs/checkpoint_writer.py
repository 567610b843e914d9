"""Checkpoints are written by a thread, from a copy of the state in host memory, while the training continues."""

import pickle
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import numpy as np
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor

from pipeline.cli.errors import FailureError
from pipeline.runs.checkpoints import Checkpoint, CheckpointFolder

WRITE_SECONDS = 600.0  # limit for one checkpoint; a disk that takes longer does not answer

Tree = TypeVar("Tree")


class CheckpointWriter(TorchCheckpointIO):
    """Writes checkpoints on a thread; the training waits only for a copy of its state in host memory.

    One write is in flight at most. The thread touches the copies until it has ended; everything else is the caller's.
    """

    def __init__(self, folder: CheckpointFolder) -> None:
        self.folder = folder
        self._copies = HostCopies()
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: object, storage_options: Checkpoint | None = None
    ) -> None:
        """Copy the state and begin to write it as `storage_options` says, after the write before has ended.

        Raises: OSError, FailureError when that write has failed; TimeoutError when it takes longer than WRITE_SECONDS.
        """
        assert storage_options is not None, "only SaveCheckpoints saves"
        self.wait()
        state, described = self._copies.copy(checkpoint), storage_options
        self.folder.path.mkdir(parents=True, exist_ok=True)
        copied = None
        if torch.cuda.is_available():
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            copied.record()

        def write() -> None:
            try:
                if copied is not None:
                    copied.synchronize()
                check_finite(state)
                self.folder.write(state, described)
            except BaseException as error:  # noqa: BLE001  # raised again where the training waits for it
                self._error = error

        self._thread = Thread(target=write, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def load_checkpoint(self, path: str | Path, *rest: object, **options: object) -> dict[str, Any]:
        """Load a checkpoint; nothing in it is executed. Raises: ValueError for a file that is none."""
        try:
            loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            advice = f"remove {Path(path).parent} to start the run over"
            raise ValueError(f"{path} cannot be read ({reason}): {advice}") from error
        return loaded

    def check(self) -> None:
        """Raise what a write has raised that has ended."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the write in flight. Raises: as `save_checkpoint`."""
        thread = self._thread  # the thread that ends a training may wait too
        if thread is not None:
            thread.join(WRITE_SECONDS)
            if thread.is_alive():
                raise TimeoutError(f"{self.folder.path} has not taken a checkpoint in {WRITE_SECONDS:.0f} seconds")
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


class HostCopies:
    """Copies of tensors in host memory, in buffers that are used again: fresh pages cost more than the copy."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tree: Tree, name: str = "") -> Tree:
        """Copy dicts, lists, tuples and the tensors in them. Copies from a GPU end with the work queued on it."""
        copied: object = tree
        if isinstance(tree, Tensor):
            copied = self._buffer(tree, name).copy_(tree, non_blocking=True)
        elif isinstance(tree, dict):
            copied = {key: self.copy(value, f"{name}.{key}") for key, value in tree.items()}
        elif isinstance(tree, list | tuple):
            copied = type(tree)(self.copy(value, f"{name}.{number}") for number, value in enumerate(tree))
        return copied  # type: ignore[return-value]  # of the same structure

    def _buffer(self, tensor: Tensor, name: str) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        return buffer


class NonFiniteStateError(FailureError):
    """A state that must not become a checkpoint."""


def check_finite(state: dict[str, Any]) -> None:
    """Raise NonFiniteStateError, naming the tensor, for weights or a state of an optimizer with NaN or infinity."""
    parts = {"weights": state["state_dict"], "optimizer": state["optimizer_states"]}
    named = [(name, tensor) for name, tensor in _tensors(parts, "") if tensor.is_floating_point() and tensor.numel()]
    name = next((name for name, tensor in named if not _is_finite(tensor)), None)
    if name is not None:
        advice = "the checkpoint before it is kept; lower recipe.optimizer.lr"
        raise NonFiniteStateError(f"step {state['global_step']} left NaN or infinite values in {name}: {advice}")


def _is_finite(tensor: Tensor) -> bool:
    # NumPy's extremes: torch would start threads, for the cores that the training needs, and isfinite() is slower.
    values = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return bool(np.isfinite((values.min(), values.max())).all())


def _tensors(tree: object, name: str) -> list[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        return [(name.removeprefix("."), tree)]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in items for found in _tensors(value, f"{name}.{key}")]
