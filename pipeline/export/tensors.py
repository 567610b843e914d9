"""The network's parameters as safetensors, and a JSON beside them that says how to use them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from models.layers import batch_norms
from models.weights.load import load_weights
from models.weights.publish import publish
from pipeline.export.graph import DTYPES
from pipeline.export.record import describe_model
from pipeline.export.settings import Form
from pipeline.runs.trained import Probabilities, TrainedModel


def write_tensors(model: TrainedModel, form: Form, *, path: Path) -> str | None:
    """Write the parameters and their JSON; return a note on the arguments of the library's network, None without one.

    Raises: ValueError for names of a publisher that has no such network.
    """
    description = describe_model(model)
    norms, note = batch_norms(model.net), None
    tensors: dict[str, Tensor] = model.net.state_dict()
    if form.names is not None:
        published = publish(model.net, model.run.network, names=form.names)
        tensors = published.tensors
        description["loads_into"] = {"library": form.names, "network": published.network}
        if published.norm_eps is not None:
            note = f"{form.names}'s {published.network} needs bn_eps={published.norm_eps:g} for the same results"
    dtype = DTYPES[form.precision]
    stored = {name: _stored(tensor, dtype) for name, tensor in tensors.items()}
    path.write_bytes(save(stored, metadata={"format": "pt"}))  # `save_file` creates files that only their owner reads
    description |= {"precision": form.precision, "norm_eps": norms[0].eps if norms else None}
    path.with_suffix(".json").write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n")
    return note


def read_back(model: TrainedModel, path: Path) -> Probabilities:
    """Return a newly built network with the parameters of a file."""
    net = model.run.build_network()
    norms = batch_norms(model.net)
    load_weights(net, path, norm_eps=norms[0].eps if norms else None)
    return Probabilities(net.eval(), model.facts, temperature=model.calibration.temperature).eval()


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor as it is stored: parameters in `dtype`, counters as they are, neither sharing memory."""
    stored = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return stored.detach().clone(memory_format=torch.contiguous_format)
