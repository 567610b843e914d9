"""What the graph asks of DALI on a GPU, where no test runs: recorded calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data.loading import graph
from data.loading.decoder import GpuDecoder


@pytest.mark.parametrize(
    ("decoder", "names"),
    [(GpuDecoder(hardware_load=0.3), ["image_slice"]), (GpuDecoder(regions=False), ["image", "slice"])],
)
def test_a_gpu_decoder_interpolates_chroma_as_the_cpu_does(
    monkeypatch: pytest.MonkeyPatch, decoder: GpuDecoder, names: list[str]
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    for owner, name in ((graph.fn.decoders, "image_slice"), (graph.fn.decoders, "image"), (graph.fn, "slice")):
        monkeypatch.setattr(owner, name, lambda *inputs, name=name, **options: calls.append((name, options)))
    graph.decode_crops("encoded", ("anchor", "shape"), decoder=decoder)
    assert [name for name, _ in calls] == names
    options = calls[0][1]
    assert options["device"] == "mixed"
    assert options["jpeg_fancy_upsampling"] is True  # DALI's default is False
    assert options["hw_decoder_load"] == decoder.hardware_load


def test_a_batch_on_a_gpu_is_imported_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[int | None] = []

    class Output:
        def __init__(self, values: torch.Tensor) -> None:
            self.values = values

        def as_tensor(self) -> Output:
            return self

        def __dlpack__(self, *, stream: int | None) -> object:
            streams.append(stream)
            return self.values.__dlpack__()

    class OnGpu(Output): ...

    monkeypatch.setattr(graph, "TensorGPU", OnGpu)
    assert graph.as_torch(OnGpu(torch.arange(3))).tolist() == [0, 1, 2]
    assert graph.as_torch(Output(torch.arange(3))).tolist() == [0, 1, 2]
    assert streams == [-1, None]  # -1 does not synchronise; None waits on the host, which a CPU has done already
