"""A trained run as a model in plain Python: from pictures to probabilities."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data.augment.crops import describe_size, height_and_width
from data.loading.decoder import DecodeSettings
from data.loading.inputs import Source, file_source
from data.loading.stream import DecodedBatch, ImageStream
from data.shards.parallel import available_cores
from models.folding import fold_batch_norms
from pipeline.build.recorded import DatasetFacts
from pipeline.runs.calibration import read_calibration
from pipeline.runs.find import FoundRun, find_run
from pipeline.runs.restore import RestoredRun

BATCH_SIZE = 64


@dataclass(frozen=True)
class Prediction:
    """The probabilities of an image, or the `error` for which it could not be read.

    `is_unsure` where the probability is below the threshold that an evaluation has fitted.
    """

    name: str
    classes: Sequence[str]
    probabilities: Tensor | None  # (K,)
    error: str | None = None
    is_unsure: bool = False

    def top(self, count: int) -> list[tuple[str, float]]:
        """Return the most probable classes with their probabilities, the first one first."""
        if self.probabilities is None:
            return []
        values, numbers = self.probabilities.topk(min(count, len(self.classes)))
        return [(self.classes[number], value) for number, value in zip(numbers.tolist(), values.tolist(), strict=True)]

    @property
    def label(self) -> str | None:
        """The most probable class, None for an image that could not be read."""
        return self.top(1)[0][0] if self.probabilities is not None else None

    @property
    def probability(self) -> float | None:
        """The probability of `label`."""
        return self.top(1)[0][1] if self.probabilities is not None else None


class Probabilities(nn.Module):
    """A network with its preparation and its calibration: uint8 RGB (N, H, W, 3) -> probabilities (N, K) float32."""

    mean: Tensor  # (3,) of 255
    inverse_std: Tensor  # (3,)

    def __init__(self, net: nn.Module, facts: DatasetFacts, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.net, self.temperature = net, temperature
        self.register_buffer("mean", 255 * torch.tensor(facts.mean), persistent=False)
        self.register_buffer("inverse_std", 1 / (255 * torch.tensor(facts.std)), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the probabilities of uint8 crops (N, H, W, 3)."""
        normalised = (images.to(torch.float32) - self.mean) * self.inverse_std
        return self.of_normalised(normalised.permute(0, 3, 1, 2))

    def of_normalised(self, images: Tensor) -> Tensor:
        """Return the probabilities of normalised float images (N, 3, H, W)."""
        logits: Tensor = self.net(images)
        return torch.softmax(logits.float() / self.temperature, dim=1)


class TrainedModel:
    """A run's network with its best weights, its classes and its preparation of images, in evaluation mode.

    `model(images)` takes uint8 RGB crops (N, H, W, 3) of `size` and returns probabilities (N, K) on their device;
    `model.predict(["a.jpg"])` reads, crops and resizes files as an evaluation does.
    """

    def __init__(self, run: RestoredRun, *, device: torch.device) -> None:
        self.run, self.device = run, device
        self.facts, self.crop = run.dataset_facts(), run.build_evaluation_crop()
        spare = range(len(self.facts.classes), run.num_classes)  # outputs beyond the data set's classes
        self.classes = (*self.facts.classes, *(f"output {number}" for number in spare))
        net, self.weights_sha256 = run.load_network()
        self.net = net.eval().to(device).to(memory_format=torch.channels_last)
        self.calibration = read_calibration(run.run.calibration_file, weights_sha256=self.weights_sha256)
        temperature, fast = self.calibration.temperature, fold_batch_norms(self.net)
        self.probabilities = Probabilities(fast, self.facts, temperature=temperature).to(device)
        self.decode_settings = decode_settings_on(device, self.facts)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the crops that the network takes."""
        return height_and_width(self.crop.image_size)

    @property
    def calibration_advice(self) -> str | None:
        """A sentence for a model without temperature and threshold."""
        if self.calibration.is_fitted:
            return None
        advice = "evaluate the run to fit them" if self.run.is_best else "they are fitted for the best weights"
        return f"no temperature and no threshold: {advice}"

    def __repr__(self) -> str:
        """Name the run, the network, and what it takes and returns."""
        shape = f"{describe_size(self.size)} px, {len(self.classes)} classes"
        return f"{type(self).__name__}({self.run.run.folder}: {self.run.network}, {shape}, {self.device})"

    @torch.inference_mode()
    def __call__(self, images: Tensor | NDArray[np.uint8]) -> Tensor:
        """Return the probabilities (N, K) of uint8 RGB crops (N, H, W, 3), a tensor or an array.

        Raises: ValueError for another type or shape.
        """
        images = torch.as_tensor(images)
        (height, width), shape = self.size, tuple(images.shape)
        if images.dtype != torch.uint8 or images.ndim != 4 or shape[1:] != (height, width, 3):
            raise ValueError(f"images are {images.dtype} {shape}, not torch.uint8 (N, {height}, {width}, 3)")
        probabilities: Tensor = self.probabilities(images.to(self.device))
        return probabilities

    def predict(self, paths: str | Path | Iterable[str | Path], *, batch_size: int = BATCH_SIZE) -> list[Prediction]:
        """Return the predictions of image files, in their order; one that cannot be read has an error."""
        paths = [paths] if isinstance(paths, str | Path) else paths
        return list(self.predict_sources(map(file_source, paths), batch_size=batch_size))

    def predict_sources(self, sources: Iterable[Source], *, batch_size: int = BATCH_SIZE) -> Iterator[Prediction]:
        """Yield the predictions of images from anywhere, in their order."""
        for batch in self.decode(sources, batch_size=batch_size):
            yield from self._predictions(batch)

    def decode(self, sources: Iterable[Source], *, batch_size: int = BATCH_SIZE) -> Iterable[DecodedBatch]:
        """Return normalised batches of images, as the network takes them."""
        return ImageStream(sources, crop=self.crop, decode=self.decode_settings, batch_size=batch_size)

    def crops(self, batch: DecodedBatch) -> Tensor:
        """Return the crops of a batch before normalisation, as the model takes them: uint8 (N, H, W, 3)."""
        of_normalised = batch.images.to(self.device).permute(0, 2, 3, 1)
        levels = of_normalised / self.probabilities.inverse_std + self.probabilities.mean
        return levels.round().clamp(0, 255).to(torch.uint8)

    @torch.inference_mode()
    def _predictions(self, batch: DecodedBatch) -> Iterator[Prediction]:
        found = iter(())
        if len(batch.images):
            probabilities = self.probabilities.of_normalised(batch.images.to(self.device)).cpu()
            if not torch.isfinite(probabilities).all():
                raise ValueError(f"{self.run.weights_file} gives NaN: its training has diverged")
            found = iter(probabilities)
        for name, error in zip(batch.names, batch.errors, strict=True):
            answer = None if error else next(found)
            is_unsure = answer is not None and self.calibration.is_unsure(float(answer.max()))
            yield Prediction(name, self.classes, answer, error, is_unsure)


def load_model(
    run: str | Path, *, runs: str | Path = "runs", device: str | torch.device | None = None, trust: bool = False
) -> TrainedModel:
    """Return a trained run as a model: a folder, a name in `runs`, an MLflow run id, `latest`, or a checkpoint.

    `device` is a GPU where there is one. Raises: FileNotFoundError, ValueError.
    """
    return open_model(find_run(str(run), runs=Path(runs)), device=device, trust=trust)


def open_model(found: FoundRun, *, device: str | torch.device | None, trust: bool) -> TrainedModel:
    """Return a run that was found as a model. Raises: FileNotFoundError, ValueError."""
    restored = RestoredRun(found.run.folder, trust=trust, checkpoint=found.checkpoint)
    return TrainedModel(restored, device=choose_device(device))


def decode_settings_on(device: torch.device, facts: DatasetFacts) -> DecodeSettings:
    """Return the settings that decode images for a network on a device, with all cores of this process."""
    return DecodeSettings(
        facts.mean,
        facts.std,
        device_id=device.index or 0 if device.type == "cuda" else None,
        crops_only=device.type == "cuda",
        threads=available_cores(),
    )


def choose_device(name: str | torch.device | None) -> torch.device:
    """Return a device that this machine has, None for a GPU where there is one. Raises: ValueError."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={name} is not cpu, cuda or cuda:NUMBER") from error
    if device.type != "cpu" and not (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()):
        raise ValueError(f"device={name} is not on this machine: leave it out, or give cpu")
    return device
