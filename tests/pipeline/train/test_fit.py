"""Ends of Lightning's fit, and what is printed of a device; GPUs are fakes."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch

from pipeline.train.callbacks.progress import memory_gib
from pipeline.train.fit import explain_memory
from pipeline.train.summary import unusable_gpu


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "the GPU's memory, with DALI's pools"),
        (
            torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors"),
            "the GPU's memory, with DALI's pools",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "the memory of this machine"),
        (RuntimeError("std::bad_alloc"), "the memory of this machine"),
        (MemoryError("std::bad_alloc"), "the memory of this machine"),
    ],
)
def test_memory_that_a_batch_lacks_is_a_batch_that_is_too_large(error: Exception, memory: str) -> None:
    explained = explain_memory(error, batch_size=256)
    assert isinstance(explained, ValueError)
    assert str(explained).startswith(f"a batch of 256 images does not fit into {memory}: lower data.batch_size")


def test_another_error_stays_as_it_is() -> None:
    error = RuntimeError("CUDA error: an illegal memory access")
    assert explain_memory(error, batch_size=256) is error


def test_memory_counts_what_all_libraries_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**30, 8 * 2**30))
    assert memory_gib(torch.device("cuda", 0)) == 5.0
    assert 0.1 < memory_gib(torch.device("cpu")) < 20


@pytest.mark.parametrize(
    ("error", "text"),
    [
        ("The NVIDIA driver on your system is too old (found version 11040). Please update", "too old"),
        ("Found no NVIDIA driver on your system. Please check", None),
        ("Torch not compiled with CUDA enabled", None),
    ],
)
def test_a_driver_that_is_too_old_is_said_where_the_cpu_trains(
    monkeypatch: pytest.MonkeyPatch, error: str, text: str | None
) -> None:
    def fails() -> None:
        raise RuntimeError(error)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fails)
    assert (text in unusable_gpu()) if text else unusable_gpu() == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert unusable_gpu() == ""


def test_lightning_still_has_what_a_common_stop_replaces() -> None:
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert callable(trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor)
    assert callable(trainer._signal_connector._sigterm_notifier_fn)
