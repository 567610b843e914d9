"""Where and how images are decoded: the settings, without the libraries that decode."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class GpuDecoder:
    """How images are decoded on a GPU. The values decide pixels, so a run keeps them.

    `regions` decodes only what a crop reads; otherwise entire images are decoded and then cut. `hardware_load` is the
    share of images for the hardware decoder of GPUs that have one. `fancy_upsampling` interpolates chroma, as every
    decoder on a CPU does.
    """

    regions: bool = True
    hardware_load: float = 0.65  # DALI's default
    fancy_upsampling: bool = True

    def __str__(self) -> str:
        scope = "regions" if self.regions else "entire images"
        return f"GPU, {scope}, at most {self.hardware_load:.0%} by its hardware decoder"


def choose_hardware_load(capability: tuple[int, int]) -> float:
    """Choose the hardware decoder's share for a GPU of this compute capability.

    Hopper's decoder (9.0) has 7 engines and keeps pace with training alone, for half of the CPU time
    (benchmarks/README.md). Other GPUs have fewer or none, or were not measured: DALI's default.
    """
    return 1.0 if capability == (9, 0) else GpuDecoder.hardware_load


@dataclass(frozen=True)
class DecodeSettings:
    """How batches are read and decoded; `mean` and `std` are fractions of 255.

    `device_id` is the GPU that uses the batches, None for the CPU; without a `gpu_decoder` the CPU decodes for either.
    With `crops_only` the graph returns uint8 crops, which `transfer.py` normalises on the device.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device_id: int | None = None
    gpu_decoder: GpuDecoder | None = None
    crops_only: bool = False
    threads: int = 2  # of DALI, on the CPU
    io_threads: int = 4  # that read shards
    readahead: int = 4  # batches that are read before they are needed
    prefetch: int = 2  # batches that DALI decodes at the same time, the one in use included

    @property
    def graph_device(self) -> int | None:
        """The GPU on which the graph runs, None for the CPU."""
        return self.device_id if self.gpu_decoder is not None else None


class DecoderChoice(NamedTuple):
    """A decoder, None for the CPU, and why it was chosen."""

    decoder: GpuDecoder | None
    reason: str

    def __str__(self) -> str:
        return f"{self.decoder or 'CPU'}: {self.reason}"
