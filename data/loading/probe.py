"""Try GPU decoders on a batch of the data set, each in its own process, so that a crash is an answer.

nvImageCodec 0.9 has crashed in region decoding on some GPUs (NVIDIA/nvImageCodec, issue 55).
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from data.augment.augmentation import Augmentation
from data.augment.crops import CropPolicy
from data.children import end_with_me, end_with_parent
from data.loading.decoder import DecoderChoice, DecodeSettings, GpuDecoder
from data.loading.graph import as_torch, build_pipeline
from data.loading.nvjpeg import CHOSEN, loaded_nvjpeg

COMMAND = (sys.executable, "-m", "data.loading.probe")
ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120  # for one try, in which DALI and CUDA start
FANCY_REGIONS = (13, 2)  # the first nvJPEG that interpolates chroma in regions
MAX_LEVELS = 3.0  # mean difference of an image from the CPU's, of 255


class Probe(NamedTuple):
    """A batch to decode: what the loader hands to the graph, and the settings of the graph."""

    inputs: tuple[Any, ...]  # a list of encoded images, then the arrays of their crops
    decode: DecodeSettings
    crop: CropPolicy


def choose_gpu_decoder(probe: Probe) -> DecoderChoice:
    """Return the first GPU decoder that decodes the batch, or the CPU. `decode.gpu_decoder` is the first candidate."""
    assert probe.decode.gpu_decoder is not None
    nvjpeg = loaded_nvjpeg()
    if nvjpeg is None:  # DALI would decode on the CPU without a word
        return DecoderChoice(None, "nvJPEG is not installed: pip install nvidia-nvjpeg")
    (version, path), failures = nvjpeg, []
    if version < FANCY_REGIONS:
        failures.append(f"regions need nvJPEG 13.2, which is {'.'.join(map(str, version))} in {path}")
    for decoder in candidates(probe.decode.gpu_decoder, nvjpeg=version):
        failure = try_decoder(probe._replace(decode=replace(probe.decode, gpu_decoder=decoder)))
        if failure is None:
            return DecoderChoice(decoder, "; ".join(failures) or "it decoded a batch")
        failures.append(f"{decoder}: {failure}")
    return DecoderChoice(None, "; ".join(failures))


def candidates(wanted: GpuDecoder, *, nvjpeg: tuple[int, ...]) -> Iterator[GpuDecoder]:
    """Yield decoders in the order of their speed, those of regions only where nvJPEG interpolates chroma in them."""
    scopes = [True, False] if nvjpeg >= FANCY_REGIONS else [False]
    for regions in scopes:
        yield replace(wanted, regions=regions)
        if wanted.hardware_load > 0:
            yield replace(wanted, regions=regions, hardware_load=0.0)


def try_decoder(*probes: Probe) -> str | None:
    """Decode batches in another process and compare them with the CPU's; return why that failed, None for success."""
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment = {**os.environ, **end_with_me(), "PYTHONPATH": path}
    if nvjpeg := loaded_nvjpeg():
        environment[CHOSEN] = nvjpeg[1]
    saved = pickle.dumps(probes)
    try:
        answer = subprocess.run(
            COMMAND, input=saved, env=environment, capture_output=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {SECONDS} s"
    if answer.returncode == 0:
        return None
    if answer.returncode < 0:
        return f"killed by {signal.Signals(-answer.returncode).name}"
    return (
        [line.strip() for line in answer.stderr.decode(errors="replace").splitlines() if line.strip()] or ["no message"]
    )[-1]


def decoded_images(probe: Probe) -> Tensor:
    """Decode the batch in this process: (N, H, W, 3) on the CPU. Raises: RuntimeError."""
    inputs, decode, crop = probe
    pipeline = build_pipeline(lambda: inputs, decode=decode, augment=Augmentation(crop), batch_size=len(inputs[0]))
    for _ in range(decode.prefetch + 1):  # later batches reuse what the first ones have allocated
        (output,) = pipeline.run()
    return as_torch(output).cpu()


def dali_reason(error: RuntimeError) -> str:
    """Return the line of DALI's message that says what happened."""
    return str(error).rpartition("encountered:")[2].strip().partition("\n")[0].rstrip(" :") or "no message"


def main() -> str | None:
    """Decode the probes on standard input; return why that failed, None for success."""
    end_with_parent()
    probes: tuple[Probe, ...] = pickle.load(sys.stdin.buffer)
    return next(filter(None, map(_failure, probes)), None)


def _failure(probe: Probe) -> str | None:
    on_cpu = replace(probe.decode, device_id=None, gpu_decoder=None)
    try:
        images, expected = decoded_images(probe), decoded_images(probe._replace(decode=on_cpu))
    except RuntimeError as error:
        return dali_reason(error)
    scale = 1.0 if probe.decode.crops_only else 255 * float(np.mean(probe.decode.std))
    difference = scale * float((images.float() - expected.float()).abs().mean((1, 2, 3)).max())  # of the worst image
    return None if difference <= MAX_LEVELS else f"an image differs by {difference:.0f} levels from the CPU's"


if __name__ == "__main__":
    sys.exit(main())
