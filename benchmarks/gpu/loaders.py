"""Batches and loaders for a device, with its first sound decoder."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import samples
from data.augment.augmentation import Augmentation
from data.augment.crops import EvaluationCrop, TrainingCrop
from data.loading.decoder import DecodeSettings, GpuDecoder, choose_hardware_load
from data.loading.loader import TrainingLoader
from data.loading.order import TrainingPlan
from data.loading.probe import Probe, choose_gpu_decoder
from data.shards.dataset import Dataset
from data.shards.images import oriented_size
from data.storage.local import LocalShards

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP = TrainingCrop(64)
DECODER_VARIABLE = "GPU_CHECK_DECODER"


def make_probe(
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
def find_decoder(device: torch.device) -> GpuDecoder | None:
    """The first GPU decoder that works, None for the CPU; the processes of the checks inherit the first answer."""
    if DECODER_VARIABLE not in os.environ:
        decoder = GpuDecoder(hardware_load=choose_hardware_load(torch.cuda.get_device_capability(device)))
        choice = choose_gpu_decoder(make_probe(samples.jpegs(32), device, decoder=decoder))
        os.environ[DECODER_VARIABLE] = json.dumps(None if choice.decoder is None else vars(choice.decoder))
    known = json.loads(os.environ[DECODER_VARIABLE])
    return None if known is None else GpuDecoder(**known)


def make_settings(
    dataset: Dataset,
    device: torch.device,
    *,
    on_cpu: bool = False,
    change: Mapping[str, Any] | None = None,
    **options: int,
) -> DecodeSettings:
    """The settings of the first sound decoder of a GPU, with values changed, or of the CPU."""
    if device.type == "cpu":
        return DecodeSettings(dataset.mean, dataset.std, **options)
    decode = DecodeSettings(dataset.mean, dataset.std, device_id=device.index or 0, crops_only=True, **options)
    decoder = None if on_cpu else find_decoder(device)
    return decode if decoder is None else replace(decode, gpu_decoder=replace(decoder, **(change or {})))


def training_loader(
    dataset: Dataset,
    device: torch.device,
    *,
    batch_size: int,
    on_cpu: bool = False,
    change: Mapping[str, Any] | None = None,
    **options: int,
) -> TrainingLoader:
    """The loader of a training on a device."""
    index, decode = dataset.index("train"), make_settings(dataset, device, on_cpu=on_cpu, change=change, **options)
    plan = TrainingPlan(index.shard_samples, seed=0, shuffle_window=4_000_000, batch_size=batch_size)
    crop = TrainingCrop(224)
    return TrainingLoader(index, LocalShards(dataset.root), plan=plan, augment=Augmentation(crop), decode=decode)
