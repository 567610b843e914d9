"""The counts of Lightning's loops with which a resumed training continues exactly where it was saved."""

from enum import Enum
from typing import Any

import pytorch_lightning as pl


class Point(Enum):
    """What a training does next, when it resumes from a checkpoint."""

    BATCH = "the next batch of the epoch"
    EVALUATION = "an evaluation, from its first batch"
    EPOCH = "the next epoch"


def point_after_batch(trainer: pl.Trainer) -> Point:
    """Return what comes after the training batch that has just ended, or during whose evaluation this is called."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    assert fetcher is not None
    if loop._should_check_val_fx(fetcher):
        return Point.EVALUATION
    return Point.EPOCH if trainer.is_last_batch else Point.BATCH


def loop_state(trainer: pl.Trainer, point: Point) -> dict[str, Any]:
    """Return the state of `trainer.fit_loop` at a point.

    Lightning derives from these counts what it skips or repeats. Its own, as they are in some of its hooks, make it
    repeat an epoch or skip an evaluation (tests/pipeline/train/test_resume_points.py tries every pair of steps).
    """
    epoch, length = trainer.current_epoch, int(trainer.num_training_batches)
    batches = trainer.fit_loop.epoch_loop.batch_idx + 1
    state = trainer.fit_loop.state_dict()
    is_over = point is Point.EPOCH
    state["epoch_progress"] = _progress(ready=epoch + 1, processed=epoch + is_over, completed=epoch + is_over)
    before, ready = ((epoch + 1) * length, 0) if is_over else (epoch * length, batches)
    # Lightning takes a batch that was processed but not completed for the last one before a save between batches.
    completed = ready - (point is Point.BATCH)
    state["epoch_loop.batch_progress"] = {
        **_progress(before, ready=ready, processed=ready, completed=completed),
        "is_last_batch": trainer.is_last_batch and not is_over,
    }
    steps, taken = trainer.global_step, ready // trainer.accumulate_grad_batches
    optimizer = state["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for progress in (state["epoch_loop.scheduler_progress"], optimizer["step"], optimizer["zero_grad"]):
        progress["current"] = dict.fromkeys(progress["current"], taken)
    state["epoch_loop.state_dict"] = {"_batches_that_stepped": steps}
    # An evaluation batch that was started but not processed makes it evaluate before it trains.
    started = int(point is Point.EVALUATION)
    evaluation = _progress(ready=started, processed=0, completed=0)
    state["epoch_loop.val_loop.batch_progress"] = {**evaluation, "is_last_batch": False}
    return state


def _progress(before: int = 0, *, ready: int, processed: int, completed: int) -> dict[str, dict[str, int]]:
    """Return counts of an epoch, and with those of the epochs before it."""
    current = {"ready": ready, "started": ready, "processed": processed, "completed": completed}
    return {"total": {name: before + count for name, count in current.items()}, "current": current}
