"""A run's folder: its name, its config, its metrics as lines of JSON, and the file that says it has ended well."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data.dataset import Dataset
from pipeline.config import flatten

FINAL = "result.json"
METRICS = "metrics.jsonl"
# What does not change what is computed does not change the run's name either.
NOT_IN_NAME = (
    "name",
    "runs",
    "trust",
    "log_every",
    "tracking.",
    "data.root",
    "data.index",
    "data.threads",
    "data.readahead",
)


@dataclass(frozen=True)
class Run:
    """The folder of a run; `name` stays the same when the same command is started again."""

    name: str
    folder: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def last_checkpoint(self) -> Path | None:
        """Where an unfinished run goes on, None at the beginning."""
        path = self.checkpoints / "last.ckpt"
        return path if path.is_file() else None

    def record(self, values: Mapping[str, float], step: int) -> None:
        """Append a line to the journal; `step` counts optimizer steps."""
        with (self.folder / METRICS).open("a") as journal:
            journal.write(json.dumps({"step": step, **values}) + "\n")

    def cut_back(self, step: int) -> None:
        """Drop what the journal says of steps after `step`, which a resumed run takes again."""
        path = self.folder / METRICS
        if path.is_file():
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            partial = path.with_name(f".{METRICS}")  # a line without its end was cut off with the process
            partial.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
            partial.replace(path)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write the file that means success, the last of a run, whole or not at all."""
        partial = self.folder / f".{FINAL}"
        partial.write_text(json.dumps(facts, indent=1) + "\n")
        partial.replace(self.folder / FINAL)


def open_run(config: DictConfig, dataset: Dataset) -> Run:
    """The run that this config means: an unfinished one of its name goes on, after finished ones comes `-2`, `-3`."""
    wanted = str(config.name or default_name(config, dataset))
    name, number = wanted, 1
    while (Path(config.runs) / name / FINAL).is_file():
        number += 1
        name = f"{wanted}-{number}"
    return Run(name, Path(config.runs) / name)


def start_run(run: Run, config: DictConfig) -> None:
    """Make the folder and write the composed config into it."""
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))


def default_name(config: DictConfig, dataset: Dataset) -> str:
    """Model, data set and eight digits that stand for every value and every sample that changes what is computed."""
    values = {key: value for key, value in flatten(config) if not key.startswith(NOT_IN_NAME)}
    values |= {f"digest of {name}": split.digest for name, split in dataset.splits.items()}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
    return f"{config.model.get('variant', 'model')}-{dataset.name}-{digest[:8]}"
