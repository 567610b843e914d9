"""What the graph asks of DALI on a GPU, where no test runs: recorded calls."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline, fn

from data import loading
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


def test_both_ways_of_mirroring_only_reverse_the_columns() -> None:
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (24, 24, 3), dtype=np.uint8) for _ in range(6)]
    mirror = [np.int32(number % 2) for number in range(6)]
    with Pipeline(batch_size=6, num_threads=1, device_id=None, exec_dynamic=True) as pipeline:
        inputs = fn.external_source(source=lambda: (images, mirror), num_outputs=2, layout=["HWC", ""])
        pipeline.set_outputs(*(graph.mirror_images(*inputs, on_gpu=on_gpu) for on_gpu in (True, False)))
    expected = np.stack([image[:, ::-1] if flag else image for image, flag in zip(images, mirror, strict=True)])
    for found in pipeline.run():
        assert found.as_array().dtype == np.uint8
        assert np.array_equal(found.as_array(), expected)


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


def test_streams_of_a_gpu_do_not_share_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loading.os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    importlib.reload(loading)
    assert loading.os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1", "the user's own value stays"
