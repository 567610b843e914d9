"""A process that writes checkpoints for ever, to be killed."""

from __future__ import annotations

import itertools
import multiprocessing
import random
from pathlib import Path
from typing import Any

import torch

from pipeline.runs.checkpoints import Best, Checkpoint, CheckpointFolder, load_manifest


def state(step: int, size: int = 50) -> dict[str, object]:
    """A state that depends on the step alone."""
    weights = torch.full((size,), float(step))
    return {"global_step": step, "state_dict": {"weight": weights}, "optimizer_states": []}


def replace_checkpoint(file: Path, content: dict[str, Any]) -> None:
    """Replace a checkpoint of a run by another one, which no manifest describes."""
    for manifest in file.parent.glob("step-*.json"):
        manifest.unlink()
    file.unlink()
    torch.save(content, file)


def save_for_ever(path: Path, first: int, size: int) -> None:
    """Write two checkpoints a step; every third step is the best."""
    folder = CheckpointFolder(path)
    torch.set_num_threads(1)
    for number in itertools.count(2 * first):
        step = number // 2
        folder.write(state(step, size), Checkpoint(step, 0, "", Best(step - step % 3, 0.5) if step >= 3 else None))


def kill_in_saves(path: Path, *, kills: int, seed: int, size: int = 200_000) -> int:
    """Kill a process in its saves again and again, each time continuing after the newest checkpoint.

    After each kill the newest checkpoint must be intact, and the next start must leave no other file. Returns the
    number of checkpoints that were written.
    """
    path.mkdir(parents=True, exist_ok=True)
    folder, draw, newest = CheckpointFolder(path), random.Random(seed), 0
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.saving"])
    for _ in range(kills):
        process = context.Process(target=save_for_ever, args=(path, newest + 1, size))
        process.start()
        while folder.last is None and process.is_alive():
            process.join(0.001)
        process.join(draw.uniform(0, 0.2))
        process.kill()
        process.join(30)
        checkpoint, damaged = folder.newest()
        assert damaged == []
        assert checkpoint is not None
        assert checkpoint.step >= newest
        newest = checkpoint.step
        folder.tidy(checkpoint)
        loaded = torch.load(path / checkpoint.file, weights_only=True)
        assert torch.equal(loaded["state_dict"]["weight"], torch.full((size,), float(newest)))
        listed = {load_manifest(manifest).file for manifest in path.glob("*.json")}
        for file in path.iterdir():
            assert file.suffix == ".json" or file.name in {"last.ckpt", "best.ckpt", *listed}, file
    return newest
