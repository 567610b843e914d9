"""Tensor files: wrappers and prefixes are removed, anything but tensors is refused."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.weights.load import load_weights
from tests.support.networks import build


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_and_prefixes_are_removed(suffix: str, wrapper: str | None, prefix: str, tmp_path: Path) -> None:
    original = build("lenet", "lenet5")
    state = {f"{prefix}{name}": tensor for name, tensor in original.state_dict().items()}
    others = {"epoch": 3, "optimizer": {"state": {}, "param_groups": []}}
    torch.save(state if wrapper is None else {wrapper: state, **others}, tmp_path / f"weights{suffix}")
    net = build("lenet", "lenet5")
    assert load_weights(net, tmp_path / f"weights{suffix}").wrapper == wrapper
    for tensor, expected in zip(net.state_dict().values(), original.state_dict().values(), strict=True):
        assert torch.equal(tensor, expected)


class Code:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {}, "args": argparse.Namespace(lr=1)}, "holds argparse.Namespace, and only tensors are read"),
        ({"model": {}, "code": Code()}, "only tensors are read"),
        ({"weight": torch.zeros(2), "lr": 0.1, "name": "x"}, "it holds lr, name, which are no tensors"),
        ([torch.zeros(2)], "it holds no tensors"),
        ({}, "it holds no tensors"),
        ({"state_dict": {}}, "it holds no tensors"),
        ({"n_averaged": torch.tensor(1)}, "the file lacks"),
    ],
)
def test_a_file_of_other_objects_is_refused(
    content: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, "weights.pth")
    with pytest.raises(ValueError, match=message):
        load_weights(build("lenet", "lenet5"), Path("weights.pth"))
    assert not Path("ran").exists()


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    net = build("lenet", "lenet5")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_weights(net, tmp_path / "none.pth")
    for name, content in (("a.pth", b""), ("b.pth", b"PK\x03\x04cut"), ("c.safetensors", b"x" * 20), ("d.pt", b"text")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read: it is damaged, or not written by "):
            load_weights(net, tmp_path / name)
    with pytest.raises(ValueError, match=r"weights\.h5: its suffix is not one of \.pth, \.pt, \.ckpt, \.safetensors"):
        load_weights(net, tmp_path / "weights.h5")
    with pytest.raises(ValueError, match=r"^head=drop must be keep or replace"):
        load_weights(net, tmp_path / "none.pth", head="drop")


@pytest.mark.filterwarnings("error:Detected pickle protocol")
@pytest.mark.parametrize("as_zip", [True, False])
def test_damage_anywhere_in_a_file_is_reported_in_a_sentence(as_zip: bool, tmp_path: Path) -> None:
    net = build("lenet", "lenet5")
    torch.save(net.state_dict(), tmp_path / "intact.pth", _use_new_zipfile_serialization=as_zip)
    intact = (tmp_path / "intact.pth").read_bytes()
    path, messages = tmp_path / "damaged.pth", []
    # Most of a file is numbers, which may have any value; names and shapes are at its ends.
    for place in (*range(0, 3000, 37), *range(len(intact) - 3000, len(intact), 37)):
        for damaged in (intact[:place], intact[:place] + bytes([intact[place] ^ 0x5A]) + intact[place + 1 :]):
            path.write_bytes(damaged)
            try:
                load_weights(net, path)
            except ValueError as error:
                messages.append(str(error))
    assert len(messages) >= 200
    assert not [message for message in messages if "weights_only" in message]  # torch's advice to read it unsafely
