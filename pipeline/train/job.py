"""A training that is built but has not started."""

from dataclasses import dataclass

from omegaconf import DictConfig

from data.loading.datamodule import ShardData
from models.learning.averaging import Averaging
from models.learning.classifier import Classifier
from pipeline.build.network import build_averaging
from pipeline.build.objects import build_object
from pipeline.build.settings import RunSettings
from pipeline.build.weights import WeightsFile
from pipeline.runs.run import Run, open_run
from pipeline.tracking.tracker import Tracker


@dataclass(frozen=True)
class Job:
    """Everything that a training needs except its Trainer."""

    module: Classifier
    data: ShardData
    run: Run
    tracker: Tracker
    settings: RunSettings
    initial_weights: WeightsFile
    averaging: Averaging | None = None

    @property
    def num_parameters(self) -> int:
        """Parameters of the network."""
        return sum(parameter.numel() for parameter in self.module.net.parameters())


def build_job(config: DictConfig, module: Classifier, *, data: ShardData, num_classes: int) -> Job:
    """Find the run that the config means, and build its tracker and initial weights.

    Raises: FileNotFoundError, ValueError.
    """
    weights = build_object(config, "weights", kind=WeightsFile)
    sha256, dataset = weights.sha256, data.dataset
    settings = RunSettings(config, num_classes=num_classes, weights_sha256=sha256, dataset=dataset)
    tracker = build_object(config, "tracking", kind=Tracker)
    run, averaging = open_run(settings, dataset), build_averaging(config)
    run.checkpoints.num_kept = settings.num_kept
    return Job(module, data, run, tracker, settings, weights, averaging)
