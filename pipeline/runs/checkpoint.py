"""Checkpoints: which are kept, and how they are written so that a reader never finds a partial one."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write each checkpoint under another name in its own folder, flush it to disk and rename it.

    Lightning stages it in the temporary folder; moving it from there to another file system is not atomic.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """Write `path` atomically."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}")
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)


class BestCheckpoint(ModelCheckpoint):
    """Write `last.ckpt` after each epoch, and `best.ckpt` when `monitor` reaches a new maximum.

    With the mode "min" it is a minimum. Without a monitor the latest checkpoint is the best one. Unlike Lightning's, it
    never takes a NaN for the best, and keeps the best score when the folder has been moved.
    """

    def __init__(self, folder: Path, *, monitor: str | None, mode: str = "max") -> None:
        super().__init__(
            folder,
            filename="best",
            monitor=monitor,
            mode=mode,
            save_last=True,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write `last.ckpt` after every epoch; Lightning skips those that are not the best."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        """Return whether a value is the best so far; Lightning would keep a first NaN."""
        is_finite = current is not None and bool(torch.isfinite(current))
        return is_finite and super().check_monitor_top_k(trainer, current)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score, with all paths in the current folder."""
        paths = {name: self._moved(path) for name, path in state_dict.items() if name.endswith("_path")}
        best = {self._moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": best, "dirpath": self.dirpath})

    def _moved(self, path: str) -> str:
        return str(Path(str(self.dirpath)) / Path(path).name) if path else path


def saved_step(checkpoint: Path) -> int:
    """Return the optimizer step of a checkpoint. Raises: ValueError when it cannot be read."""
    try:
        step: int = torch.load(checkpoint, mmap=True, weights_only=True)["global_step"]
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"{checkpoint} cannot be read ({reason}): remove it to start the run over") from error
    return step
