"""The values of a config that decide the result of a run: its name, its fingerprint and its record."""

import re
from enum import StrEnum
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from data.shards.dataset import Dataset
from models.arguments import require
from models.learning.evaluation import TOP1
from pipeline.build.choice import build_choice
from pipeline.build.network import network_name
from pipeline.cli.compose import flatten
from pipeline.cli.environment import without_secrets
from pipeline.cli.secrets import mask_secrets

OURS = ("models.", "data.", "pipeline.")
# Keys that do not change the result.
NOT_IN_NAME = (
    "name",
    "runs",
    "out",
    "again",
    "trust",
    "log_every",
    "checkpoint.",
    "on_nonfinite",
    "hang_seconds",
    "tracking.",
    "weights.file",  # its SHA-256 counts
    "data.root",
    "data.index",
    "data.source",
    "data.threads",
    "data.readahead",
    "data.io_threads",
    "data.prefetch",
    "data.inflight",
    "data.cache",
    "data.cache_gb",
    "data.decoder",  # the choice is in the fingerprint
    "data.hw_decoder_load",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
)
# A run may resume on other devices if the global batch stays the same; the resolved precision is compared.
NOT_IN_FINGERPRINT = (*NOT_IN_NAME, "data.batch_size", "recipe.accumulate", "trainer.precision")


SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}  # of the units of a budget


class Again(StrEnum):
    """The treatment of a run that is already in the folder of a training.

    CONTINUE accepts one of the same settings, and has nothing left to do if it is finished. REPLACE does the same, and
    moves one of other settings aside.
    """

    CONTINUE = "continue"
    REPLACE = "replace"
    REFUSE = "refuse"


class RunSettings:
    """The values of a config that a run uses; `weights_sha256` stands for the file of weights.

    `runs` is the folder of all runs, `name` is None for a default name, `out` for a folder in `runs`. `parameters` are
    all values by dotted key; `in_name` and `in_fingerprint` are those that decide the result. `record` is the config as
    YAML, from which the run can be restored without the data set. None of these holds a secret, and `record` leaves out
    `trust`.
    Raises: ValueError.
    """

    def __init__(
        self, config: DictConfig, *, num_classes: int, weights_sha256: str | None, dataset: Dataset | None = None
    ) -> None:
        self.network = network_name(config)
        self.runs = Path(str(config.runs))
        self.name = None if config.name is None else str(config.name)
        self.out = None if config.out is None else Path(str(config.out))
        require(self.out is None or self.name is None, "names the run's folder too: leave name out", out=config.out)
        require(config.again in (None, *Again), f"is not one of {', '.join(Again)}", again=config.again)
        self.again = None if config.again is None else Again(config.again)
        self.norm_momentum: float | None = config.model.get("norm_momentum")
        self.seed: int = config.seed
        self.log_every: int = config.log_every
        self.every_steps: int | None = config.checkpoint.every_steps
        self.every_minutes: float | None = config.checkpoint.every_minutes
        self.num_kept: int = config.checkpoint.keep
        self.on_nonfinite: str = config.on_nonfinite
        self.hang_seconds: float = config.hang_seconds
        self.compile: bool | str | None = config.trainer.get("compile")
        self.choice = build_choice(config)
        # Without unset values, so that a new option does not change the names of runs that do not use it.
        unset = {"trainer.compile": False, "choose_by": TOP1.key, "min_improvement": 0}
        resolved_choice = {"choose_by": self.choice.metric.key}  # whichever of its names was given
        with without_secrets():
            values = mask_secrets(flatten(config)) | {"weights.sha256": weights_sha256} | resolved_choice
        given = {key: value for key, value in values.items() if value not in (None, unset.get(key))}
        deciding = {key: _without_location(key, value) for key, value in given.items()}
        left_out = NOT_IN_NAME if config.budget is None else (*NOT_IN_NAME, "recipe.epochs")  # known after the name
        self.in_name = {key: value for key, value in deciding.items() if not key.startswith(left_out)}
        self.in_fingerprint = {key: value for key, value in deciding.items() if not key.startswith(NOT_IN_FINGERPRINT)}
        resolved = {"model": {"num_classes": num_classes}, "weights": {"sha256": weights_sha256}}
        with without_secrets():
            plain = OmegaConf.to_container(config, resolve=True)
        assert isinstance(plain, dict)
        public = mask_secrets({str(key): value for key, value in plain.items() if key != "trust"})
        record = OmegaConf.merge(OmegaConf.create(public), resolved)
        assert isinstance(record, DictConfig)
        self.parameters = flatten(record)
        if dataset is not None:
            colours = {"mean": list(dataset.mean), "std": list(dataset.std)}
            described = {"name": dataset.name, **colours, "classes": list(dataset.classes)}
            record = OmegaConf.merge(record, {"dataset": described})
        self.record = OmegaConf.to_yaml(record)


def parse_budget(budget: object) -> float:
    """Return the seconds of a budget such as 20m. Raises: ValueError for another text."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", str(budget))
    require(found is not None and float(found[1]) > 0, "must be a time, as 90s, 20m or 2.5h", budget=budget)
    assert found is not None
    return float(found[1]) * SECONDS[found[2]]


def _without_location(key: str, value: object) -> object:
    """Reduce every `_target_` of this project to package and name, so that moving a class changes no run."""
    if isinstance(value, dict):
        return {name: _without_location(name, inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_location(key, item) for item in value]
    target = str(value)
    if not key.endswith("_target_") or not target.startswith(OURS):
        return value
    return f"{target.partition('.')[0]}.{target.rpartition('.')[2]}"
