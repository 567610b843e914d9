"""The loaders of a data set for Lightning, which knows rank and device only after it has started."""

import itertools
import math
import os
from dataclasses import dataclass, replace

import pytorch_lightning as pl
import torch
from torch import Tensor

from data.arguments import require
from data.augment.augmentation import Augmentation
from data.augment.crops import CropPolicy
from data.loading.decoder import DecoderChoice, DecodeSettings, GpuDecoder, choose_hardware_load
from data.loading.loader import Loader, TrainingLoader
from data.loading.order import EvaluationPlan, TrainingPlan
from data.loading.probe import Probe, choose_gpu_decoder
from data.shards.dataset import Dataset
from data.shards.parallel import CoreShare, share_of_cores
from data.storage.local import Storage
from data.storage.open import open_storage

DECODERS = ("auto", "gpu", "cpu")


@dataclass(frozen=True)
class LoaderSettings:
    """Settings of both loaders; `batch_size` is per step and device, `threads=None` this rank's share of the cores.

    `shuffle_window` samples are shuffled together, `readahead` batches are read early by `io_threads` threads,
    `prefetch` batches are decoded at the same time, the one in use included. `decoder` is "gpu", "cpu", or "auto" for
    the GPU where one trains and can decode; `hw_decoder_load` is the share of images for its hardware decoder, None for
    1 on Hopper and 0.65 elsewhere.
    Raises: ValueError for another decoder, a share outside 0 to 1, and numbers below 1.
    """

    batch_size: int
    accumulate: int = 1
    seed: int = 0
    shuffle_window: int = 4_000_000
    readahead: int = 4
    threads: int | None = None
    io_threads: int = 4
    prefetch: int = 2
    decoder: str = "auto"
    hw_decoder_load: float | None = None

    def __post_init__(self) -> None:
        require(self.decoder in DECODERS, f"is not one of {', '.join(DECODERS)}", decoder=self.decoder)
        load = self.hw_decoder_load
        is_share = load is None or (isinstance(load, int | float) and not isinstance(load, bool) and 0 <= load <= 1)
        require(is_share, "must be a number from 0 to 1, or null", hw_decoder_load=load)
        for name in ("batch_size", "accumulate", "shuffle_window", "readahead", "threads", "io_threads", "prefetch"):
            value = getattr(self, name)
            is_valid = value is None or (isinstance(value, int) and value is not True and value >= 1)
            require(is_valid, "must be an integer of at least 1", **{name: value})


class ShardData(pl.LightningDataModule):
    """Training batches in shuffled order; evaluation batches that contain every image of the split once.

    `storage` is by default that of the data set, without a cache. `limit_batches` shortens a training epoch to that
    number of batches per rank; each epoch has its own order.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        training_augment: Augmentation,
        evaluation_crop: CropPolicy,
        settings: LoaderSettings,
        storage: Storage | None = None,
    ) -> None:
        super().__init__()
        self.dataset, self.settings = dataset, settings
        self.training_augment, self.evaluation_crop = training_augment, evaluation_crop
        self.training_index = dataset.index("train")
        self._storage = storage or open_storage(dataset.root, dataset.shard_bytes)
        self.limit_batches: int | None = None
        self.gpu_decoder: GpuDecoder | None = None  # None: images are decoded on the CPU
        # The test set serves data sets without a validation set.
        self.evaluation_split = next((split for split in ("val", "test") if split in dataset.splits), None)

    @property
    def num_evaluation_images(self) -> int:
        """Images in the evaluation split, 0 without one."""
        return self.dataset.splits[self.evaluation_split].samples if self.evaluation_split else 0

    def training_plan(self, rank: int, world_size: int) -> TrainingPlan:
        """Return a rank's training plan. Raises: ValueError when there are fewer images than a global batch."""
        return TrainingPlan(
            self.training_index.shard_samples,
            seed=self.settings.seed,
            shuffle_window=self.settings.shuffle_window,
            batch_size=self.settings.batch_size,
            accumulate=self.settings.accumulate,
            rank=rank,
            world_size=world_size,
            limit=self.limit_batches,
        )

    def images_per_step(self, world_size: int) -> int:
        """Return the images of an optimizer step on all ranks."""
        return self.training_plan(0, world_size).global_batch_size

    def checked_plan(self, world_size: int) -> TrainingPlan:
        """Return the first rank's plan. Raises: ValueError for too few images to train on or to evaluate."""
        if self.evaluation_split is not None:
            EvaluationPlan(self.num_evaluation_images, self.settings.batch_size, world_size=world_size)
        return self.training_plan(0, world_size)

    def choose_decoder(self, device: torch.device, *, before: DecoderChoice | None, probes: bool) -> DecoderChoice:
        """Decide where images are decoded for a device, and why.

        `before` is the choice with which the run began, None for a new run. A new run tries the GPU's decoder on one
        batch if `probes`; otherwise the choice comes from rank 0 in `setup`. If it must be the GPU's, every rank of a
        new run tries it, so that all fail together.
        Raises: ValueError for a GPU decoder without a GPU, or one that fails.
        """
        wanted = self.settings.decoder
        choice = DecoderChoice(None, "as configured")
        if device.type != "cuda":
            require(wanted != "gpu", "needs a GPU that trains: use cpu or auto", decoder=wanted)
            choice = DecoderChoice(None, "no GPU trains")
        elif before is not None and (wanted == "auto" or (wanted == "gpu" and before.decoder is not None)):
            load, choice = self.settings.hw_decoder_load, before
            # Another one than before is refused by the run; 0 is what the probe falls back to.
            if before.decoder is not None and load is not None and before.decoder.hardware_load > 0:
                choice = before._replace(decoder=replace(before.decoder, hardware_load=load))
        elif wanted == "gpu" or (wanted == "auto" and probes):
            choice = choose_gpu_decoder(self._probe(device))
            works = wanted == "auto" or choice.decoder is not None
            require(works, f"does not decode this data set ({choice.reason}): use cpu", decoder=wanted)
        self.gpu_decoder = choice.decoder
        return choice

    def setup(self, stage: str) -> None:
        """Give every rank the decoder of rank 0."""
        assert self.trainer is not None
        if self.trainer.world_size > 1:
            self.gpu_decoder = self.trainer.strategy.broadcast(self.gpu_decoder)

    def core_share(self, num_devices: int) -> CoreShare:
        """Return the cores that decode for this rank, with the reason, on a machine with this many devices in use."""
        share = share_of_cores(int(os.environ.get("LOCAL_WORLD_SIZE", num_devices)))
        return CoreShare(self.settings.threads, "configured") if self.settings.threads else share

    def train_dataloader(self) -> TrainingLoader:
        """Return this rank's training batches."""
        assert self.trainer is not None
        plan, decode = self.training_plan(self.trainer.global_rank, self.trainer.world_size), self._decode_settings()
        index, augment, seed = self.training_index, self.training_augment, self.settings.seed
        return TrainingLoader(index, self._storage, plan=plan, augment=augment, decode=decode, seed=seed)

    def val_dataloader(self) -> Loader | list[Loader]:
        """Return this rank's share of the evaluation split; an empty list without one."""
        assert self.trainer is not None
        if self.evaluation_split is None:
            return []
        index, batch_size = self.dataset.index(self.evaluation_split), self.settings.batch_size
        plan = EvaluationPlan(len(index), batch_size, self.trainer.global_rank, self.trainer.world_size)
        augment, decode = Augmentation(self.evaluation_crop), self._decode_settings()
        return Loader(index, self._storage, plan=plan, augment=augment, decode=decode)

    def preview(self, count: int, *, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Return the first training images of an epoch as one rank on a CPU gets them, and their labels.

        Shapes: uint8 (N, H, W, 3), int64 (N,), where N is `count` or the images of the epoch.
        """
        plan, decode = self.training_plan(0, 1), self._settings_on(torch.device("cpu"), num_devices=1)
        augment, seed = self.training_augment, self.settings.seed
        loader = TrainingLoader(
            self.training_index, self._storage, plan=plan, augment=augment, decode=decode, seed=seed
        )
        loader.load_state_dict({"epoch": epoch, "step": 0})
        num_batches = math.ceil(count / self.settings.batch_size)
        batches = [(batch.images.clone(), batch.labels) for batch in itertools.islice(loader, num_batches)]
        images, labels = (torch.cat(parts)[:count] for parts in zip(*batches, strict=True))
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.dataset.mean, self.dataset.std))
        levels = ((images * std + mean) * 255).round_().clamp_(0, 255).to(torch.uint8)
        return levels.permute(0, 2, 3, 1), labels

    def _decode_settings(self) -> DecodeSettings:
        assert self.trainer is not None
        return self._settings_on(self.trainer.strategy.root_device, num_devices=self.trainer.num_devices)

    def _settings_on(self, device: torch.device, *, num_devices: int) -> DecodeSettings:
        return DecodeSettings(
            self.dataset.mean,
            self.dataset.std,
            device_id=device.index or 0 if device.type == "cuda" else None,
            gpu_decoder=self.gpu_decoder,
            crops_only=device.type == "cuda",
            threads=self.core_share(num_devices).cores,
            io_threads=self.settings.io_threads,
            readahead=self.settings.readahead,
            prefetch=self.settings.prefetch,
        )

    def _probe(self, device: torch.device) -> Probe:
        """The first training batch, for a GPU's decoder."""
        load = self.settings.hw_decoder_load
        if load is None:
            load = choose_hardware_load(torch.cuda.get_device_capability(device))
        decode = replace(self._settings_on(device, num_devices=1), gpu_decoder=GpuDecoder(hardware_load=load))
        index, augment, plan = self.training_index, self.training_augment, self.training_plan(0, 1)
        seed = self.settings.seed
        loader = TrainingLoader(index, self._storage, plan=plan, augment=augment, decode=decode, seed=seed)
        return Probe(loader.first_inputs(), decode, augment.crop)
