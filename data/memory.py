"""Out-of-memory errors as one sentence."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

GPU_MEMORY = "the GPU's memory"


def exhausted_memory(error: RuntimeError | MemoryError) -> str | None:
    """Return which memory was too small, None where none was."""
    if isinstance(error, torch.OutOfMemoryError) or "CUDA error: out of memory" in str(error):
        return GPU_MEMORY
    is_host = isinstance(error, MemoryError) or re.search("DefaultCPUAllocator|std::bad_alloc", str(error))
    return "the memory of this machine" if is_host else None


@contextmanager
def memory_errors(batch_size: int) -> Iterator[None]:
    """Turn a lack of memory for batches into advice. Raises: ValueError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        memory = exhausted_memory(error)
        if memory is None:
            raise
        raise ValueError(f"a batch of {batch_size:,} images does not fit into {memory}: lower batch_size") from error
