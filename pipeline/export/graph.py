"""A model as a torch.export program with a batch of any size."""

import copy
import io
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pipeline.runs.trained import Probabilities, TrainedModel

INPUT, OUTPUT, BATCH = "images", "probabilities", "batch"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STACK = "stack_trace"  # of torch's nodes: names files of this machine


class _Cast(nn.Module):
    """A network whose images are converted to the type of its weights."""

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtype = copy.deepcopy(net).to(dtype), dtype

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images.to(self.dtype))
        return logits


def in_precision(model: TrainedModel, precision: str) -> Probabilities:
    """Return the model with its network in a precision; normalisation and softmax stay in float32."""
    if precision == "float32":
        return model.probabilities
    net = _Cast(model.net, DTYPES[precision])
    return Probabilities(net, model.facts, temperature=model.calibration.temperature).eval()


def export_program(module: Probabilities, size: tuple[int, int]) -> ExportedProgram:
    """Trace the model: uint8 (N, H, W, 3) -> float32 (N, K). Raises: ValueError if its steps depend on values."""
    images = torch.zeros(2, *size, 3, dtype=torch.uint8)
    try:
        with torch.no_grad():
            program = torch.export.export(module, (images,), dynamic_shapes={INPUT: {0: Dim(BATCH, min=1)}})
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"torch.export cannot trace this network: {first_line(error)}") from error
    for graph_module in program.graph_module.modules():
        for node in getattr(getattr(graph_module, "graph", None), "nodes", ()):
            node.meta.pop(STACK, None)
    return program


def write_program(program: ExportedProgram, path: Path) -> None:
    """Write a program for `torch.export.load`."""
    content = io.BytesIO()  # torch's writer has no error of its own for a full disk
    with warnings.catch_warnings(action="ignore"):  # of views of weights, which are complete here
        torch.export.save(program, content)
    path.write_bytes(content.getbuffer())


def first_line(error: Exception) -> str:
    """Return the first line of an error's message that is not empty."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
