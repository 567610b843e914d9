"""A run's name and its folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.shards.dataset import Dataset, Split
from pipeline.cli.config import compose, flatten
from pipeline.runs.run import Values, fingerprint, open_run

DATASET = Dataset(
    Path(), Path(), "digits", ("0", "1"), (0, 0, 0), (1, 1, 1), {"train": Split((), "train.parquet", "a")}
)


def values_of(root: Path, *words: str) -> Values:
    return flatten(compose("train", ["+model=resnet", f"runs={root}", *words]))


def test_the_same_command_means_the_same_run(tmp_path: Path) -> None:
    names = [open_run(values_of(tmp_path, *words), DATASET).name for words in ((), (), ("tracking=none",))]
    assert names[0] == names[1] == names[2]
    assert names[0].startswith("resnet18-digits-")


def test_what_changes_the_result_changes_the_name(tmp_path: Path) -> None:
    words = ([], ["seed=1"], ["recipe.epochs=9"], ["model.variant=resnet34"], ["data.batch_size=32"])
    names = {open_run(values_of(tmp_path, *change), DATASET).name for change in words}
    other_images = replace(DATASET, splits={"train": Split((), "train.parquet", "b")})
    assert len(names | {open_run(values_of(tmp_path), other_images).name}) == 6


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    for expected in ("mine", "mine-2", "mine-3"):
        run = open_run(values_of(tmp_path, "name=mine"), DATASET)
        assert run.name == expected
        run.folder.mkdir()
        assert open_run(values_of(tmp_path, "name=mine"), DATASET) == run, "an unfinished run goes on"
        run.finish({})


def test_the_journal_is_cut_back_to_where_a_run_goes_on(tmp_path: Path) -> None:
    run = open_run(values_of(tmp_path), DATASET)
    run.folder.mkdir()
    for step in (10, 20, 30):
        run.record({"train/loss": 1.0 / step}, step)
    with (run.folder / "metrics.jsonl").open("a") as journal:
        journal.write('{"step": 15, "train/lo')  # what a killed process may leave
    run.checkpoints.mkdir()
    torch.save({"global_step": 20}, run.checkpoints / "last.ckpt")
    assert run.cut_back() == {"step": 30, "train/loss": 30}
    run.record({"train/loss": 0.5}, 30)
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert lines == [
        '{"step": 10, "train/loss": 0.1}',
        '{"step": 20, "train/loss": 0.05}',
        '{"step": 30, "train/loss": 0.5}',
    ]


def test_a_run_goes_on_only_with_what_it_was_begun_with(tmp_path: Path) -> None:
    def computed(*words: str, global_batch_size: int = 64, precision: str = "32-true") -> dict[str, object]:
        values = values_of(tmp_path, *words)
        return fingerprint(values, DATASET, global_batch_size=global_batch_size, precision=precision)

    run = open_run(values_of(tmp_path, "name=mine"), DATASET)
    run.begin(computed(), "")
    run.check(computed("seed=1"))  # it has no checkpoint yet, and begins anew
    torch.save({"global_step": 20}, run.checkpoints / "last.ckpt")
    # Other devices and other batches of the same sum are the same run.
    for same in (("log_every=1",), ("data.batch_size=32", "recipe.accumulate=2"), ("trainer=ddp", "data.threads=3")):
        run.check(computed(*same))
    for name, other in (
        ("seed", computed("seed=1")),
        ("recipe.optimizer.lr", computed("recipe.optimizer.lr=0.2")),
        ("global_batch_size", computed(global_batch_size=128)),
        ("precision", computed(precision="bf16-mixed")),
        ("trainer.limit_train_batches", computed("+trainer.limit_train_batches=3")),
    ):
        with pytest.raises(ValueError, match=f"mine was begun with {name}="):
            run.check(other)
