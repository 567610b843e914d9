"""A run's name and its folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from data.dataset import Dataset, Split
from pipeline.config import compose
from pipeline.journal import open_run

DATASET = Dataset(
    Path(), Path(), "digits", ("0", "1"), (0, 0, 0), (1, 1, 1), {"train": Split((), "train.parquet", "a")}
)


def config_of(root: Path, *words: str) -> DictConfig:
    return compose("train", ["+model=resnet", f"runs={root}", *words])


def test_the_same_command_means_the_same_run(tmp_path: Path) -> None:
    names = [open_run(config_of(tmp_path, *words), DATASET).name for words in ((), (), ("tracking=none",))]
    assert names[0] == names[1] == names[2]
    assert names[0].startswith("resnet18-digits-")


def test_what_changes_the_result_changes_the_name(tmp_path: Path) -> None:
    words = ([], ["seed=1"], ["recipe.epochs=9"], ["model.variant=resnet34"], ["data.batch_size=32"])
    names = {open_run(config_of(tmp_path, *change), DATASET).name for change in words}
    other_images = replace(DATASET, splits={"train": Split((), "train.parquet", "b")})
    assert len(names | {open_run(config_of(tmp_path), other_images).name}) == 6


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    for expected in ("mine", "mine-2", "mine-3"):
        run = open_run(config_of(tmp_path, "name=mine"), DATASET)
        assert run.name == expected
        run.folder.mkdir()
        assert open_run(config_of(tmp_path, "name=mine"), DATASET) == run, "an unfinished run goes on"
        run.finish({})


def test_the_journal_is_cut_back_to_where_a_run_goes_on(tmp_path: Path) -> None:
    run = open_run(config_of(tmp_path), DATASET)
    run.folder.mkdir()
    for step in (10, 20, 30):
        run.record({"train/loss": 1.0 / step}, step)
    with (run.folder / "metrics.jsonl").open("a") as journal:
        journal.write('{"step": 15, "train/lo')  # what a killed process may leave
    run.cut_back(20)
    run.record({"train/loss": 0.5}, 30)
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert lines == [
        '{"step": 10, "train/loss": 0.1}',
        '{"step": 20, "train/loss": 0.05}',
        '{"step": 30, "train/loss": 0.5}',
    ]
