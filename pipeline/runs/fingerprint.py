"""The fingerprint of a run: everything that decides its bits. A run resumes only with an equal one."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from data.loading.decoder import DecoderChoice, GpuDecoder
from data.loading.nvjpeg import loaded_nvjpeg
from data.shards.dataset import Dataset

Fingerprint = Mapping[str, object]  # settings, digests and versions by name
LIBRARIES = ("torch", "nvidia-dali-cuda130")
CODECS, NVJPEG = "nvidia-nvimgcodec-cu13", "nvJPEG"
DECODER, DIGEST_OF = "data.decoder", "digest of "
ADVICE = {
    DECODER: "continue it where it began, with a GPU that decodes or on a CPU",
    "global_batch_size": "let data.batch_size x recipe.accumulate x devices be what it was",
}


def fingerprint(
    settings: Mapping[str, object],
    dataset: Dataset,
    *,
    global_batch_size: int,
    precision: str,
    decoder: GpuDecoder | None,
) -> Fingerprint:
    """Return everything that decides what a run computes.

    Equal fingerprints lead to equal bits on a CPU, and on GPUs of one kind with `trainer.deterministic`.
    """
    # Decoders differ in pixels, and so do their versions.
    decoding = {DECODER: "cpu" if decoder is None else asdict(decoder)}
    resolved = {"global_batch_size": global_batch_size, "precision": precision, **decoding}
    versions = {library: metadata.version(library) for library in LIBRARIES}
    if decoder is not None:
        nvjpeg = loaded_nvjpeg()
        versions[NVJPEG] = "none" if nvjpeg is None else ".".join(map(str, nvjpeg[0]))
        versions[CODECS] = metadata.version(CODECS)
    return dict(settings) | digests(dataset) | resolved | versions


class OtherSettingsError(ValueError):
    """A run was started with another fingerprint."""


def check_unchanged(before: Fingerprint, now: Fingerprint, *, run: Path) -> None:
    """Raise OtherSettingsError, naming the first difference, unless both fingerprints are equal as JSON."""
    before = {DECODER: "cpu", **before}  # runs from before there was a choice
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), json.loads(json.dumps(now.get(name)))
        if old != new:
            advice = ADVICE.get(name, "give the values it was started with")
            began, wanted = (_as_typed(name, value) for value in (old, new))
            problem = f"{run} was started with {name}={began}, not {wanted}"
            raise OtherSettingsError(f"{problem}: add name=NAME or another out=FOLDER for a new run, or {advice}")


def _as_typed(name: str, value: object) -> str:
    if name == DECODER and isinstance(value, dict):
        return f"gpu {value}"
    return value if isinstance(value, str) else json.dumps(value)


def recorded_decoder(before: Fingerprint) -> DecoderChoice:
    """Return the decoder of a fingerprint."""
    decoder = before.get(DECODER)
    return DecoderChoice(GpuDecoder(**decoder) if isinstance(decoder, dict) else None, "as the run began")


def decoding_of(before: Fingerprint) -> Fingerprint:
    """Return the part of a fingerprint that the choice of a decoder decides."""
    return {name: before[name] for name in (DECODER, NVJPEG, CODECS) if name in before}


def digests(dataset: Dataset) -> dict[str, str]:
    """Return the digest of each split's index by name."""
    return {f"{DIGEST_OF}{name}": split.digest for name, split in dataset.splits.items()}
