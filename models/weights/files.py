"""Read tensor files without executing code in them, and unwrap the state dict."""

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
NUM_SHOWN = 3
# Errors of torch and safetensors for bytes that are not their format, or incomplete.
UNREADABLE = (
    *(SafetensorError, pickle.UnpicklingError, struct.error, RuntimeError, OSError, EOFError),
    *(AssertionError, AttributeError, LookupError, TypeError, ValueError),
)


class TensorFile(NamedTuple):
    """The tensors of a file in its order, their wrapper, and the network's settings in a checkpoint of ours."""

    tensors: dict[str, Tensor]
    wrapper: str | None
    norm_eps: float | None  # of the batch norms
    image_size: int | None  # side in pixels the network was built for


def shorten(names: Sequence[str]) -> str:
    """Return the first three names and the number of others."""
    rest = f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else ""
    return ", ".join(names[:NUM_SHOWN]) + rest


def _strip_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stripped = {name: tensor for name, tensor in state.items() if name != "n_averaged"}  # counts averaged weights
    while prefix := _common_prefix(stripped):
        stripped = {name.removeprefix(prefix): tensor for name, tensor in stripped.items()}
    return stripped


def _common_prefix(state: Mapping[str, Tensor]) -> str | None:
    return next((prefix for prefix in PREFIXES if state and all(name.startswith(prefix) for name in state)), None)


def _unwrap(content: object, path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Return the state dict in a checkpoint and its key there. Raises: ValueError when there is none."""
    wrapper = None
    while isinstance(content, Mapping):
        inner = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
            if others or not content:
                break
            return {str(name): value for name, value in content.items()}, wrapper
        wrapper, content = inner, content[inner]
    held = f"{shorten(others)}, which are no tensors" if isinstance(content, Mapping) and content else "no tensors"
    raise ValueError(f"{path} is no state dict, bare or in {', '.join(WRAPPERS)}: it holds {held}")


def _explain_error(path: Path, error: Exception) -> str:
    objects: list[str] = []
    if isinstance(error, pickle.UnpicklingError):
        try:
            objects = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except UNREADABLE:  # damaged, or older than torch 1.6 and not a zip
            objects = re.findall(r"GLOBAL (\S+)", str(error))
    if objects:
        return f"holds {shorten(objects)}, and only tensors are read: ask its author for the state dict alone"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    writer = "safetensors" if path.suffix == SAFETENSORS else "torch"
    return f"cannot be read: it is damaged, or not written by {writer}"


def read(path: Path) -> TensorFile:
    """Read tensors and plain values only. Raises: FileNotFoundError; ValueError for other formats and contents."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: its suffix is not one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns about pickles before it refuses them
            if path.suffix == SAFETENSORS:
                content: object = load_file(path)
            else:
                content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ValueError(f"{path} {_explain_error(path, error)}") from error
    state, wrapper = _unwrap(content, path)
    settings = content if isinstance(content, Mapping) else {}
    eps, size = settings.get("norm_eps"), settings.get("image_size")
    norm_eps, image_size = eps if isinstance(eps, float) else None, size if isinstance(size, int) else None
    return TensorFile(_strip_prefixes(state), wrapper, norm_eps, image_size)
