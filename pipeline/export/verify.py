"""Exported files, opened as their users open them, against the network."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pipeline.export.settings import ONNX, PROGRAM, Form
from pipeline.export.tensors import read_back
from pipeline.runs.trained import Probabilities, TrainedModel

Answer = Callable[[Tensor], Tensor]  # crops (N, H, W, 3) uint8 -> probabilities (N, K)


def open_file(path: Path, form: Form, *, model: TrainedModel) -> Answer:
    """Return a file as a function. Raises: ValueError for an operation that onnxruntime does not have."""
    if form.format == ONNX:
        from pipeline.export.onnx_graph import open_onnx

        return open_onnx(path)
    if form.format == PROGRAM:
        return torch.no_grad()(torch.export.load(path).module())
    return torch.no_grad()(read_back(model, path))


def largest_difference(answer: Answer, model: TrainedModel, *, crops: Tensor, batch_size: int) -> float:
    """Return the largest difference of a probability between a file and the network; NaN counts as 1.

    Batches of one image are compared too. The network is the trained one, with its batch norms not folded.
    """
    trained = Probabilities(model.net, model.facts, temperature=model.calibration.temperature).eval()
    batches = [*torch.split(crops, batch_size), crops[:1]]
    with torch.inference_mode():
        differences = [(answer(batch) - trained(batch)).abs().nan_to_num(nan=1.0).max() for batch in batches]
    return float(max(differences))


def accuracies(
    answers: Mapping[str, Answer], labelled: Iterable[tuple[Tensor, Tensor]]
) -> tuple[dict[str, float], int]:
    """Return the share of right answers of each function, and the number of images."""
    right, count = dict.fromkeys(answers, 0), 0
    for crops, labels in labelled:
        count += len(labels)
        for name, answer in answers.items():
            right[name] += int((answer(crops).argmax(1) == labels).sum())
    return {name: number / max(count, 1) for name, number in right.items()}, count
