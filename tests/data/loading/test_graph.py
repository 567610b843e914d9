"""What the graph asks of DALI on a GPU, where no test runs: recorded calls."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline, fn
from torchvision.transforms.v2 import functional as v2

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


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("large", [False, True])
def test_threads_resize_every_image_as_torchvision_does(threads: int, large: bool) -> None:
    generator, largest = np.random.default_rng(0), 900 if large else 60
    sizes = [*generator.integers(9, largest, (9, 2)).tolist(), (24, 24), (24, 48)]
    images = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    resize = graph._TorchResize(16, 24, threads=threads)
    for shown in (images, images[::-1]):  # the memory is that of the first
        for image, resized in zip(shown, resize(shown), strict=True):
            expected = v2.resize(torch.from_numpy(image).permute(2, 0, 1), [24, 24], antialias=True)
            assert np.array_equal(resized, expected.permute(1, 2, 0).numpy())


def test_images_of_the_right_size_are_left_alone() -> None:
    images = [np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8) for number in range(3)]
    assert graph._TorchResize(4, 24, threads=2)(images) is images
    expected = [v2.resize(torch.from_numpy(image).permute(2, 0, 1), [24, 24], antialias=True) for image in images]
    assert all(np.array_equal(one, other.permute(1, 2, 0)) for one, other in zip(images, expected, strict=True))


def test_streams_of_a_gpu_do_not_share_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loading.os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    importlib.reload(loading)
    assert loading.os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1", "the user's own value stays"
