"""Batches and loaders for a device, with its first sound decoder."""

import json
import os
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from benchmarks.gpu import samples
from data.loading.crops import EvaluationCrop, TrainingCrop
from data.loading.decoder import DecodeSettings, GpuDecoder
from data.loading.loader import TrainingLoader
from data.loading.order import TrainingPlan
from data.loading.probe import Probe, choose_gpu_decoder
from data.loading.storage import LocalShards
from data.shards.dataset import Dataset
from data.shards.images import oriented_size

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP = TrainingCrop(64)
KNOWN = "GPU_CHECK_DECODER"


def probe_of(
    images: list[bytes],
    device: torch.device,
    *,
    decoder: GpuDecoder | None,
    crop: TrainingCrop | EvaluationCrop = CROP,
) -> Probe:
    """A batch of these images with their crops, for one decoder."""
    device_id = device.index or 0 if device.type == "cuda" else None
    decode = DecodeSettings(MEAN, STD, device_id=device_id, gpu_decoder=decoder, crops_only=device.type == "cuda")
    sizes = np.array([oriented_size(one) for one in images], np.int64)
    crops = crop.crops(sizes, np.arange(len(images)), seed=0, epoch=0)
    arrays = [array for array in crops if array is not None]
    return Probe(([np.frombuffer(one, np.uint8) for one in images], *arrays), decode, crop)


@lru_cache
def sound_decoder(device: torch.device) -> GpuDecoder | None:
    """The first GPU decoder that works, None for the CPU; the processes of the checks inherit the first answer."""
    if KNOWN not in os.environ:
        choice = choose_gpu_decoder(probe_of(samples.jpegs(32), device, decoder=GpuDecoder()))
        os.environ[KNOWN] = json.dumps(None if choice.decoder is None else vars(choice.decoder))
    known = json.loads(os.environ[KNOWN])
    return None if known is None else GpuDecoder(**known)


def settings_of(
    dataset: Dataset, device: torch.device, *, on_cpu: bool = False, load: float | None = None, **options: int
) -> DecodeSettings:
    """The settings of the first sound decoder of a GPU, with this load of its hardware decoder, or of the CPU."""
    if device.type == "cpu":
        return DecodeSettings(dataset.mean, dataset.std, **options)
    decode = DecodeSettings(dataset.mean, dataset.std, device_id=device.index or 0, crops_only=True, **options)
    if on_cpu:
        return decode
    decoder = sound_decoder(device)
    if decoder is not None and load is not None:
        decoder = replace(decoder, hardware_load=load)
    return replace(decode, gpu_decoder=decoder)


def training_loader(
    dataset: Dataset,
    device: torch.device,
    *,
    batch_size: int,
    on_cpu: bool = False,
    load: float | None = None,
    **options: int,
) -> TrainingLoader:
    """The loader of a training on a device."""
    index, decode = dataset.index("train"), settings_of(dataset, device, on_cpu=on_cpu, load=load, **options)
    plan = TrainingPlan(index.shard_samples, seed=0, shuffle_window=4_000_000, batch_size=batch_size)
    crop = TrainingCrop(224)
    return TrainingLoader(index, LocalShards(dataset.root), plan=plan, crop=crop, decode=decode)
