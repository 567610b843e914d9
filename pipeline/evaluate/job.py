"""An evaluation that is ready to run: models, data, crops."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from rich.console import Console

from data.loading.crops import CropPolicy
from data.shards.dataset import Dataset
from data.shards.indexing import open_dataset
from data.shards.parallel import share_of_cores
from pipeline.build.network import check_forward
from pipeline.cli.console import main_console, print_skipped
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

    `is_own` where the data set is that of the run.
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

    def _sizes(self, accuracies: Sequence[float]) -> Mapping[int, float]:
        return {crop.image_size: accuracy for crop, accuracy in zip(self.crops, accuracies, strict=True)}

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
    model, other = (None if config[key] is None else _load(config, key, ranks=ranks) for key in ("run", "versus"))
    assert model is not None
    for one in (model, other):
        if one is not None and one.run.unfinished:
            main_console().print(one.run.unfinished, highlight=False, markup=False, soft_wrap=True)
    if other is not None and set(other.classes) != set(model.classes):
        raise ValueError(
            f"versus={config.versus} has other classes than run={config.run}: compare runs of one data set"
        )
    if config.dataset is None:
        dataset, is_own = _own_dataset(model, split=config.split), True
    else:
        dataset = _open(Path(str(config.dataset)))
        is_own = tuple(dataset.classes) == tuple(model.facts.classes) and not model.run.changed_splits(dataset)
    class_numbers(dataset, model)
    split = _chosen_split(config.split, dataset)
    calibration = None if is_own else _own_calibration(model, precision=config.precision)
    cores = share_of_cores(ranks.local_world_size).cores
    for one in (model, other):
        if one is not None:
            one.decode_settings = replace(one.decode_settings, threads=cores)
    return EvaluationJob(
        model,
        other,
        dataset,
        is_own,
        split,
        "val" if "val" in dataset.splits else split,
        calibration,
        _accepted(crops_of_sizes(model.crop, config.size), model, size=config.size),
        config.batch_size,
        config.precision or model.calibration.precision or PRECISION,
        config.seed,
        ranks,
    )


def _load(config: DictConfig, key: str, *, ranks: Ranks) -> TrainedModel:
    """Load the run that the config names under `run` or `versus`."""
    found = find_run(str(config[key]), runs=Path(str(config.runs)), key=key)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return open_model(
        found, device=f"cuda:{ranks.local_rank}" if device == "cuda" else device, trust=bool(config.trust)
    )


def _own_dataset(model: TrainedModel, *, split: str | None) -> Dataset:
    """Open the run's data set; one that comes from a source is packed again where it is missing.

    Raises: FileNotFoundError without it; ValueError where it has changed, its training images aside.
    """
    run = model.run
    if not run.data_root.exists() and not run.values("data").get("source"):
        raise FileNotFoundError(f"{run.run.name} was trained on {run.data_root}, which does not exist: add data=FOLDER")
    dataset = run.open_dataset()
    changed = [f"split {one}" for one in run.changed_splits(dataset) if one != "train" or split == "train"]
    changed += ["its classes"] if tuple(dataset.classes) != tuple(model.facts.classes) else []
    if changed:
        began = f"{dataset.root} has changed since {run.run.name} began ({', '.join(changed)})"
        raise ValueError(f"{began}: data={dataset.root} evaluates it as another data set")
    return dataset


def _own_calibration(model: TrainedModel, *, precision: float | None) -> Calibration | None:
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


def _open(root: Path) -> Dataset:
    if not root.exists():
        raise FileNotFoundError(f"data={root} is not a folder: pack one with python -m pipeline.pack")
    with config_keys_in_errors({"root": "data"}):
        dataset, skipped = open_dataset(root, None)
    print_skipped(Console(), skipped)
    return dataset


def _chosen_split(wanted: str | None, dataset: Dataset) -> str:
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
        raise ValueError(f"size={size} does not suit {model.run.network}, trained with {model.image_size} px: {reason}")
    if len(accepted) == 1 and len(crops) > 1:
        text = f"size={size}: {model.run.network} takes only {accepted[0].image_size} px"
        main_console().print(text, highlight=False, markup=False, soft_wrap=True)
    return accepted
