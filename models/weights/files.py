"""Files of tensors as others write them: read without running anything, unwrapped, names bare."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

SAFETENSORS = ".safetensors"
SUFFIXES = (".pth", ".pt", ".ckpt", SAFETENSORS)
WRAPPERS = ("model_ema", "state_dict_ema", "state_dict", "model")  # averaged weights are the better ones
PREFIXES = ("module.", "_orig_mod.", "net.")  # of DDP and averaging, of torch.compile, of our Classifier
NO_WEIGHT = "n_averaged"  # what averaging counts
NAMED = 3
# What torch and safetensors raise of bytes that are no file of theirs, or no whole one.
UNREADABLE = (
    *(SafetensorError, pickle.UnpicklingError, struct.error, RuntimeError, OSError, EOFError),
    *(AssertionError, AttributeError, LookupError, TypeError, ValueError),
)


class TensorFile(NamedTuple):
    """The tensors of a file in its order, the wrapper they were in, and what our checkpoints say of the network."""

    tensors: dict[str, Tensor]
    wrapper: str | None
    norm_eps: float | None  # of its batch norms
    image_size: int | None  # side in pixels that it was built for


def shorten(names: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + rest


def bare_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without what wrappers of modules put before all names."""
    state = {name: tensor for name, tensor in state.items() if name != NO_WEIGHT}
    while state and (
        prefix := next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in state)), None)
    ):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def unwrap(content: object, path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The state dict in a checkpoint, and under which name it was there.

    Raises: ValueError when there is none.
    """
    wrapper = None
    while isinstance(content, Mapping):
        inner = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
            if others or not content:
                break
            return {str(name): value for name, value in content.items()}, wrapper
        wrapper, content = inner, content[inner]
    what = f"{shorten(others)}, which are no tensors" if isinstance(content, Mapping) and content else "no tensors"
    raise ValueError(f"{path} is no state dict, bare or in {', '.join(WRAPPERS)}: it holds {what}")


def refusal(path: Path, error: Exception) -> str:
    """Why a file was not read: the first things in it that are no tensors, where it is a pickle of such."""
    found: list[str] = []
    if isinstance(error, pickle.UnpicklingError):
        try:
            found = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except UNREADABLE:  # of before torch 1.6, which is not a zip, or damaged
            found = re.findall(r"GLOBAL (\S+)", str(error))
    if found:
        return f"holds {shorten(found)}, and only tensors are read: let whoever made it save the state dict alone"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    return (
        f"cannot be read: it is damaged, or not written by {'safetensors' if path.suffix == SAFETENSORS else 'torch'}"
    )


def read(path: Path) -> TensorFile:
    """Read a state dict from `.pth`, `.pt`, `.ckpt` or `.safetensors`, unpickling tensors and plain values only.

    Raises: FileNotFoundError; ValueError for other files, and for one that holds anything else.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"weights={path} is not one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"weights={path}: there is no such file")
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns of pickles that it refuses a moment later
            if path.suffix == SAFETENSORS:
                content: object = load_file(path)
            else:
                content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ValueError(f"{path} {refusal(path, error)}") from error
    state, wrapper = unwrap(content, path)
    told = content if isinstance(content, Mapping) else {}
    eps, size = told.get("norm_eps"), told.get("image_size")
    return TensorFile(
        bare_names(state),
        wrapper,
        norm_eps=eps if isinstance(eps, float) else None,
        image_size=size if isinstance(size, int) else None,
    )
