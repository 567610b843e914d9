"""An evaluation that is ready to run: models, data, crops."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from rich.console import Console

from data.augment.crops import CropPolicy, describe_size
from data.shards.dataset import Dataset
from data.shards.indexing import open_dataset
from data.shards.parallel import share_of_cores
from data.storage.location import Url, parse_root
from pipeline.build.first_rank import open_on_first_rank
from pipeline.build.network import check_forward
from pipeline.build.trainer import limit_threads
from pipeline.cli.console import main_console, print_line, print_skipped
from pipeline.cli.errors import config_keys_in_errors
from pipeline.evaluate.assess import Evaluation, assess, compare, fit_calibration
from pipeline.evaluate.forward import answer_split, class_numbers, crops_of_sizes
from pipeline.evaluate.metrics import Answers
from pipeline.evaluate.ranks import Ranks
from pipeline.runs.calibration import Calibration
from pipeline.runs.find import find_run
from pipeline.runs.trained import TrainedModel, open_model

PREFERRED = ("test", "val")  # splits, in the order in which they are taken
OWN_IMAGES = "the run’s own data"
PRECISION = 0.95  # share of right answers for which the first threshold is fitted


@dataclass(frozen=True)
class EvaluationJob:
    """Everything that an evaluation needs; `calibration` is None where it is fitted on the split `fit_split`.

    `is_own` is whether `dataset` is the run's own.
    """

    model: TrainedModel
    other: TrainedModel | None
    dataset: Dataset
    is_own: bool
    split: str
    fit_split: str
    calibration: Calibration | None
    crops: Sequence[CropPolicy]
    batch_size: int
    precision: float
    seed: int
    ranks: Ranks

    def evaluate(self) -> tuple[Evaluation, CropPolicy] | None:
        """Return the evaluation with the crop that was best, None on other ranks than the first.

        Raises: ValueError, UnreadableImage.
        """
        model, is_main = self.model, self.ranks.rank == 0
        fit_answers = [self._answers(model, split=self.fit_split, crop=crop) for crop in self.crops]
        accuracies = [float(one.is_among_top(1).mean()) for one in fit_answers if one is not None]
        best = self.ranks.share(int(np.argmax(accuracies)) if is_main else None)
        crop, answers = self.crops[best], fit_answers[best]
        if self.split != self.fit_split:
            answers = self._answers(model, split=self.split, crop=crop)
        versus = self._answers(self.other, split=self.split, crop=self.other.crop) if self.other else None
        if answers is None:
            return None
        fitted = fit_answers[best]
        assert fitted is not None
        calibration = self.calibration or fit_calibration(fitted, precision=self.precision)
        evaluation = assess(
            answers,
            classes=model.classes,
            calibration=calibration,
            fitted_on=f"the split {self.fit_split}" if self.calibration is None else OWN_IMAGES,
            sizes=self._sizes(accuracies),
            seed=self.seed,
        )
        if versus is not None and self.other:
            evaluation = replace(evaluation, versus=compare(answers, versus, name=self.other.run.run.name))
        return evaluation, crop

    def _sizes(self, accuracies: Sequence[float]) -> Mapping[str, float]:
        sizes = [describe_size(crop.image_size) for crop in self.crops]
        return dict(zip(sizes, accuracies, strict=True))

    def _answers(self, model: TrainedModel, *, split: str, crop: CropPolicy) -> Answers | None:
        answers = answer_split(
            model, self.dataset, split=split, crop=crop, batch_size=self.batch_size, ranks=self.ranks
        )
        if answers is None or model is self.model:
            return answers
        places = {name: number for number, name in enumerate(model.classes)}
        order = np.array([places[name] for name in self.model.classes])  # the other model's classes in this one's order
        return Answers(answers.log_probabilities[:, order], np.argsort(order)[answers.labels])


def build_job(config: DictConfig, ranks: Ranks) -> EvaluationJob:
    """Load the models and the data set of a config. Raises: FileNotFoundError, ValueError."""
    model = _load(config, "run", ranks=ranks)
    other = _load(config, "versus", ranks=ranks) if config.versus is not None else None
    for one in (model, other):
        if one is not None and one.run.unfinished:
            print_line(main_console(), one.run.unfinished)
    if other is not None and set(other.classes) != set(model.classes):
        raise ValueError(
            f"versus={config.versus} has other classes than run={config.run}: compare runs of one data set"
        )
    given = None if config.dataset is None else _given_folder(str(config.dataset))
    dataset = _open_own_dataset(model) if given is None else _open(given, model)
    class_numbers(dataset, model)
    changes = _changes(dataset, model, split=config.split)
    if given is None and changes:
        began = f"{dataset.root} has changed since {model.run.run.name} began ({', '.join(changes)})"
        raise ValueError(f"{began}: data={dataset.root} evaluates it as another data set")
    split = _choose_split(config.split, dataset)
    calibration = _read_own_calibration(model, precision=config.precision) if changes else None
    cores = share_of_cores(ranks.local_world_size).cores
    limit_threads(ranks.local_world_size)
    for one in (model, other):
        if one is not None:
            one.decode_settings = replace(one.decode_settings, threads=cores)
    return EvaluationJob(
        model=model,
        other=other,
        dataset=dataset,
        is_own=not changes,
        split=split,
        fit_split="val" if "val" in dataset.splits else split,
        calibration=calibration,
        crops=_accepted(crops_of_sizes(model.crop, config.size), model, size=config.size),
        batch_size=config.batch_size,
        precision=config.precision or model.calibration.precision or PRECISION,
        seed=config.seed,
        ranks=ranks,
    )


def _load(config: DictConfig, key: str, *, ranks: Ranks) -> TrainedModel:
    """Load the run that the config names under `run` or `versus`."""
    found = find_run(str(config[key]), runs=Path(str(config.runs)), key=key)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return open_model(
        found, device=f"cuda:{ranks.local_rank}" if device == "cuda" else device, trust=bool(config.trust)
    )


def _open_own_dataset(model: TrainedModel) -> Dataset:
    """Open the run's data set; one that comes from a source is packed again where it is missing."""
    run = model.run
    if isinstance(run.data_root, Path) and not run.data_root.exists() and not run.values("data").get("source"):
        raise FileNotFoundError(f"{run.run.name} was trained on {run.data_root}, which does not exist: add data=FOLDER")
    return run.open_dataset()


def _given_folder(text: str) -> Path:
    if isinstance(parse_root(text), Url):
        raise ValueError(f"data={text} is a URL, which only the runs that were trained on it evaluate: give a folder")
    return Path(text)


def _changes(dataset: Dataset, model: TrainedModel, *, split: str | None) -> list[str]:
    """Name what differs from the run's data set: its classes, and splits that are read here or are missing."""
    read = {split or _choose_split(None, dataset), "val"}
    changed = [one for one in model.run.changed_splits(dataset) if one in read or one not in dataset.splits]
    differs = tuple(dataset.classes) != tuple(model.facts.classes)
    return [f"split {one}" for one in changed] + (["its classes"] if differs else [])


def _read_own_calibration(model: TrainedModel, *, precision: float | None) -> Calibration | None:
    """Return what was fitted on the run's own data, None where that was not done.

    Raises: ValueError for another precision than that of its threshold.
    """
    calibration = model.calibration
    if not calibration.is_fitted:
        return None
    if precision is not None and precision != calibration.precision:
        fitted = f"the threshold of {model.run.run.name} is fitted for precision={calibration.precision}"
        raise ValueError(f"{fitted}: leave precision={precision} out, or evaluate the run with it first")
    return calibration


def _open(root: Path, model: TrainedModel) -> Dataset:
    if not root.exists():
        raise FileNotFoundError(f"data={root} is not a folder: pack one with python -m pipeline.pack")
    with config_keys_in_errors({"root": "data"}):
        return open_on_first_rank(lambda: _open_all(root, model), root=root, folder=root)


def _open_all(root: Path, model: TrainedModel) -> Dataset:
    label_field = str(model.run.values("data").get("label_field") or "label")
    dataset, skipped = open_dataset(root, None, label_field=label_field)
    print_skipped(Console(), skipped)
    return dataset


def _choose_split(wanted: str | None, dataset: Dataset) -> str:
    if wanted is not None and wanted not in dataset.splits:
        raise ValueError(f"split={wanted} is not one of those of {dataset.name}: {', '.join(dataset.splits)}")
    found = wanted or next((one for one in PREFERRED if one in dataset.splits), None)
    if found is None:
        raise ValueError(f"{dataset.name} has no test and no val split: split=train evaluates what it was trained on")
    return found


def _accepted(crops: Sequence[CropPolicy], model: TrainedModel, *, size: object) -> list[CropPolicy]:
    """Return the crops whose size suits the network. Raises: ValueError where none does."""
    accepted, reason = [], ""
    for crop in crops:
        try:
            check_forward(model.net, crop.image_size)
            accepted.append(crop)
        except ValueError as error:
            reason = str(error)
    if not accepted:
        raise ValueError(
            f"size={size} does not suit {model.run.network}, trained with {describe_size(model.size)} px: {reason}"
        )
    if len(accepted) == 1 and len(crops) > 1:
        text = f"size={size}: {model.run.network} takes only {describe_size(accepted[0].image_size)} px"
        print_line(main_console(), text)
    return accepted
