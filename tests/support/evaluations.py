"""Both evaluations of a split on one of several ranks: that of a training, and that of the verb."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data.augment.augmentation import Augmentation
from data.augment.crops import EvaluationCrop, TrainingCrop
from data.loading.datamodule import LoaderSettings, ShardData
from data.loading.decoder import DecodeSettings
from data.shards.dataset import Dataset, Split
from data.storage.open import open_storage
from models.learning.classifier import Classifier
from models.learning.recipe import Recipe
from models.learning.schedules import cosine
from pipeline.evaluate.forward import answer_split
from pipeline.evaluate.metrics import Answers, class_metrics, summarise
from pipeline.evaluate.ranks import Ranks

SIDE = 8  # pixels of the digits
CROP = EvaluationCrop(SIDE, crop_fraction=1.0)


class Distances(nn.Module):
    """Negative distances to a template of each class, exact: no order of summation changes a bit of a logit.

    Shapes: (N, 3, 8, 8) -> (N, K).
    """

    def __init__(self, dataset: Dataset, templates: NDArray[np.int64]) -> None:
        super().__init__()
        self.register_buffer("templates", torch.from_numpy(templates))  # (K, 192) levels of 0 to 255
        self.register_buffer("mean", torch.tensor(dataset.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(dataset.std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        levels = ((images * self.std + self.mean) * 255).round().long().flatten(1)  # (N, 192)
        return (levels[:, None] - self.templates).abs().sum(2).float() / -1024  # (N, K)


class RankAnswer(NamedTuple):
    """What a rank has found: samples and metrics of a training's evaluation or its refusal, answers of the verb's."""

    samples: list[int]
    images: int
    training: dict[str, float]
    refusal: str | None
    answers: Answers | None
    summary: dict[str, float] | None


def first_images(dataset: Dataset, num_images: int) -> Dataset:
    """Shorten the validation split, which has one shard, to its first images."""
    split = dataset.splits["val"]
    (shard,) = split.shards
    shorter = Split((replace(shard, samples=num_images),), split.index, split.digest)
    return replace(dataset, splits=dataset.splits | {"val": shorter})


def evaluate_twice(
    rank: int,
    world_size: int,
    *,
    dataset: Dataset,
    templates: NDArray[np.int64],
    num_images: int,
    batch_size: int,
) -> RankAnswer:
    """Evaluate the first images as a training and as `pipeline.evaluate` do, on this rank."""
    shorter, net = first_images(dataset, num_images), Distances(dataset, templates)
    recorder, images, metrics, refusal = Recorder(), 0, {}, None
    try:
        images, metrics = validate(shorter, net, batch_size=batch_size, ranks=(rank, world_size), recorder=recorder)
    except ValueError as error:
        refusal = str(error)
    model = SimpleNamespace(
        net=net,
        classes=dataset.classes,
        device=torch.device("cpu"),
        decode_settings=DecodeSettings(dataset.mean, dataset.std, threads=1, io_threads=1),
        run=SimpleNamespace(
            weights_file=Path("best.ckpt"), open_storage=lambda of: open_storage(of.root, of.shard_bytes)
        ),
    )
    ranks = Ranks(rank, world_size, rank, world_size)
    answers = answer_split(model, shorter, split="val", crop=CROP, batch_size=batch_size, ranks=ranks)
    summary = None if answers is None else summarise(answers, class_metrics(answers))
    return RankAnswer(recorder.samples, images, metrics, refusal, answers, summary)


class Recorder(pl.Callback):
    """Keeps the samples of every validation batch."""

    def __init__(self) -> None:
        self.samples: list[int] = []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: object, batch: object, *rest: object
    ) -> None:
        self.samples += batch.samples.tolist()


def validate(
    dataset: Dataset, net: nn.Module, *, batch_size: int, ranks: tuple[int, int], recorder: Recorder
) -> tuple[int, dict[str, float]]:
    """Evaluate with Lightning as a training does: the number of images on all ranks, and the metrics."""
    rank, world_size = ranks
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "GROUP_RANK": 0}
    # As torchrun sets them. The process group exists already; address and port are not used.
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "test"}
    if world_size > 1:
        os.environ.update({name: str(value) for name, value in own.items()} | launched)
    else:
        for name in (*own, *launched):
            os.environ.pop(name, None)
    settings = LoaderSettings(batch_size, threads=1, io_threads=1)
    data = ShardData(
        dataset, training_augment=Augmentation(TrainingCrop(SIDE)), evaluation_crop=CROP, settings=settings
    )
    recipe = Recipe(1, torch.optim.SGD, cosine)
    module = Classifier(net, num_classes=len(dataset.classes), recipe=recipe)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    strategy = "ddp" if world_size > 1 else "auto"
    trainer = pl.Trainer(accelerator="cpu", devices=world_size, strategy=strategy, callbacks=[recorder], **quiet)
    (metrics,) = trainer.validate(module, datamodule=data, verbose=False)
    return module.evaluated_images, metrics
