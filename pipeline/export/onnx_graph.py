"""A torch.export program as an ONNX file, and an ONNX file as a function."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.export import ExportedProgram

from pipeline.export.graph import BATCH, INPUT, OUTPUT, first_line


def write_onnx(program: ExportedProgram, path: Path, *, opset: int, facts: Mapping[str, str]) -> None:
    """Write a program as ONNX, with `facts` as its metadata.

    Raises: ValueError for an operation without an equivalent; onnx's ValidationError for a graph that is not valid.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            exported = torch.onnx.export(
                program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], opset_version=opset, verbose=False
            )
    except RuntimeError as error:
        raise ValueError(f"torch.onnx cannot convert this network: {first_line(error)}") from error
    assert exported is not None
    graph = exported.model_proto
    written_opset = next(one.version for one in graph.opset_import if not one.domain)
    if written_opset != opset:
        raise ValueError(f"opset={opset}: torch wrote {written_opset} instead: give opset={written_opset}")
    _tidy(graph)
    helper.set_model_props(graph, dict(facts))
    onnx.save_model(graph, path)
    onnx.checker.check_model(path, full_check=True)


def store_as_bfloat16(path: Path) -> None:
    """Store the weights of an ONNX file in bfloat16, of which onnxruntime computes float32 when it loads the file.

    onnxruntime has no bfloat16 convolution on CPUs.
    """
    model = onnx.load_model(path)
    weights = [one for one in model.graph.initializer if one.data_type == TensorProto.FLOAT and one.dims]
    casts = []
    for tensor in weights:
        values = torch.from_numpy(numpy_helper.to_array(tensor).copy()).bfloat16()
        name, dims = tensor.name, list(tensor.dims)
        stored = helper.make_tensor(
            f"{name}.bfloat16",
            TensorProto.BFLOAT16,
            dims,
            values.view(torch.int16).numpy().astype("<i2").tobytes(),
            raw=True,
        )
        tensor.CopyFrom(stored)
        casts.append(helper.make_node("Cast", [stored.name], [name], name=f"{name}.cast", to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save_model(model, path)
    onnx.checker.check_model(path, full_check=True)


def _tidy(model: onnx.ModelProto) -> None:
    """Name the batch axis; remove what torch notes of its own nodes, which names files of this machine."""
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = BATCH
    del model.graph.value_info[:]
    parts = [model.graph, *model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer]
    for part in (model, *parts):
        del part.metadata_props[:]
        part.doc_string = ""


def open_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """Return an ONNX file as a function, run by onnxruntime. Raises: ValueError for an operation that it lacks."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no other base
        raise ValueError(f"onnxruntime cannot run this network: {str(error).splitlines()[0]}") from error

    def answer(crops: Tensor) -> Tensor:
        (probabilities,) = session.run(None, {INPUT: crops.numpy()})
        return torch.from_numpy(probabilities)

    return answer
