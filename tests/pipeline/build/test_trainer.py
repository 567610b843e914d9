"""The Trainer's options."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from torch import nn

from data.shards import parallel
from models.learning.classifier import Classifier
from pipeline.build.network import build_recipe
from pipeline.build.trainer import (
    build_callbacks,
    build_trainer,
    choose_precision,
    launched_ranks,
    limit_threads,
    no_gpu_reason,
)
from pipeline.cli.compose import compose


def untrained(config: DictConfig) -> Classifier:
    """Some network with the config's recipe."""
    return Classifier(nn.Linear(1, 1), num_classes=2, recipe=build_recipe(config))


def test_precision_auto_is_what_the_device_multiplies_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, expected in (
        ({}, "32-true"),
        ({"avx512_bf16": True}, "bf16-mixed"),
        ({"amx_bf16": 1}, "bf16-mixed"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda value=capabilities: value)
        assert choose_precision("auto", "cpu") == expected
        assert choose_precision("auto", "cpu", is_depthwise=True) == "32-true"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in (((7, 5), "16-mixed"), ((8, 0), "bf16-mixed"), ((9, 0), "bf16-mixed")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda value=capability: value)
        assert choose_precision("auto", "auto", is_depthwise=True) == expected
    assert choose_precision("16-mixed", "auto") == "16-mixed"


def test_a_driver_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update it.")

    monkeypatch.setattr(torch.cuda, "init", refuse)
    assert no_gpu_reason() == " (The NVIDIA driver on your system is too old (found version 11040))"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, (2, 4)),
        ({"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, None),
        ({"WORLD_SIZE": "2"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_NNODES": "2"}, None),
        ({"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_TASKS_PER_NODE": "2(x3)"}, (3, 2)),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}, (1, 2)),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}, None),
    ],
)
def test_the_ranks_of_a_launcher_are_read_from_its_environment(
    environment: dict[str, str], expected: tuple[int, int] | None
) -> None:
    assert launched_ranks(environment) == expected


def test_unequal_nodes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"srun has started 2,1 ranks on its nodes: the same number on every node is"):
        launched_ranks({"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1"})


def test_ranks_that_would_train_alone_in_one_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    config = compose("train", ["+model=resnet", "trainer=cpu"])
    with pytest.raises(
        ValueError, match=r"4 ranks were started, but trainer\.devices=1 on 1 of the nodes trains with 1"
    ):
        build_trainer(config, untrained(config), callbacks=[], plugins=[], folder=tmp_path)


@pytest.mark.parametrize(
    ("variables", "ranks", "threads"),
    [
        ({}, 1, 3),
        ({}, 2, 1),
        ({"SLURM_PROCID": "0", "SLURM_CPUS_PER_TASK": "2"}, 1, 2),
        ({"SLURM_PROCID": "0", "SLURM_CPUS_PER_TASK": "64"}, 1, 3),
        ({"OMP_NUM_THREADS": "1"}, 1, 8),
    ],
)
def test_torch_computes_on_the_share_of_the_rank(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], ranks: int, threads: int
) -> None:
    monkeypatch.setattr(parallel, "available_cores", lambda: 3)
    for name in ("OMP_NUM_THREADS", "SLURM_PROCID", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = torch.get_num_threads()
    torch.set_num_threads(8)  # as on a machine of eight cores
    try:
        limit_threads(ranks)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_callbacks_that_save_checkpoints_are_refused() -> None:
    target = "pytorch_lightning.callbacks.ModelCheckpoint"
    config = compose("train", ["+model=resnet", f"+callbacks.mine={{_target_: {target}}}"])
    with pytest.raises(ValueError, match=r"callbacks\.mine=ModelCheckpoint saves checkpoints, which a training does"):
        build_callbacks(config)


def test_ranks_share_gradients_and_no_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train"])  # pytest's may have a -m, which here begins a sweep
    config = compose("train", ["+model=resnet", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"])
    parts = {"callbacks": [], "plugins": [], "folder": tmp_path}
    trainer = build_trainer(config, untrained(config), **parts)
    assert trainer.strategy._ddp_kwargs == {"gradient_as_bucket_view": True, "broadcast_buffers": False}


@pytest.mark.parametrize(("words", "benchmark"), [((), True), (("+trainer.deterministic=true",), False)])
def test_cudnn_may_choose_its_algorithms_unless_bits_must_repeat(
    tmp_path: Path, words: tuple[str, ...], benchmark: bool
) -> None:
    config = compose("train", ["+model=resnet", "trainer=cpu", *words])
    before = torch.backends.cudnn.benchmark
    build_trainer(config, untrained(config), callbacks=[], plugins=[], folder=tmp_path)
    chosen, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, before
    torch.use_deterministic_algorithms(False)
    assert chosen is benchmark
