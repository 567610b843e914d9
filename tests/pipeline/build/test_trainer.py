"""The Trainer's precision."""

from __future__ import annotations

import pytest
import torch

from pipeline.build.trainer import choose_precision


def test_precision_auto_is_what_the_device_multiplies_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, expected in (
        ({}, "32-true"),
        ({"avx512_bf16": True}, "bf16-mixed"),
        ({"amx_bf16": 1}, "bf16-mixed"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda value=capabilities: value)
        assert choose_precision("auto", "cpu") == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in (((7, 5), "16-mixed"), ((8, 0), "bf16-mixed"), ((9, 0), "bf16-mixed")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda value=capability: value)
        assert choose_precision("auto", "auto") == expected
    assert choose_precision("16-mixed", "auto") == "16-mixed"
