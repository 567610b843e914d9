"""Every family of networks becomes an ONNX file and a program that answer batches of any size as the network does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.build.recorded import DatasetFacts
from pipeline.export.graph import export_program, write_program
from pipeline.export.onnx_graph import open_onnx, store_as_bfloat16, write_onnx
from pipeline.runs.trained import Probabilities
from tests.support.networks import build, by_numbers, scatter
from tests.support.published import SMALLEST

FACTS = DatasetFacts("numbers", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), tuple("abcde"))
QUICK = ("lenet", "coatnet")
CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(SMALLEST)]


def with_preparation(net: nn.Module) -> Probabilities:
    return Probabilities(scatter(net), FACTS, temperature=1.5).eval().to(memory_format=torch.channels_last)


@pytest.mark.parametrize("architecture", CASES)
def test_every_family_can_be_exported(architecture: str, tmp_path: Path) -> None:
    side = 32 if architecture == "lenet" else 64
    net = build(architecture, SMALLEST[architecture], num_classes=5, in_channels=3, image_size=side)
    module = with_preparation(net)
    program = export_program(module, (side, side))
    write_program(program, tmp_path / "model.pt2")
    write_onnx(program, tmp_path / "model.onnx", opset=20, facts={})
    answers = {
        "pt2": torch.export.load(tmp_path / "model.pt2").module(),
        "onnx": open_onnx(tmp_path / "model.onnx"),
    }
    store_as_bfloat16(tmp_path / "model.onnx")
    answers["bfloat16"] = open_onnx(tmp_path / "model.onnx")
    for count in (1, 3):
        crops = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8)
        with torch.no_grad():
            expected = module(crops)
            for name, answer in answers.items():
                tolerance = 0.05 if name == "bfloat16" else 1e-5
                torch.testing.assert_close(answer(crops), expected, rtol=0, atol=tolerance, msg=name)


def test_a_network_that_depends_on_values_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^torch.export cannot trace this network: [^\n]+$"):
        export_program(with_preparation(by_numbers(num_classes=5)), (32, 32))
