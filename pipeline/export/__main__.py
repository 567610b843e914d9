"""Export a trained run: `python -m pipeline.export run=latest`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from pipeline.cli.errors import FAILURE, ConfigError
from pipeline.cli.run import fast_imports, run_verb
from pipeline.cli.secrets import mask_address
from pipeline.cli.verb import Verb
from pipeline.export.settings import MIN_OPSET, ONNX, Form, read_forms

if TYPE_CHECKING:
    from data.augment.crops import ImageSize
    from pipeline.export.files import Checks, Exported
    from pipeline.runs.restore import RestoredRun
    from pipeline.runs.trained import TrainedModel
    from pipeline.tracking.mlflow_tracker import MLflowTracker

VERB = Verb(
    "export",
    "Export a trained run as ONNX, as a torch.export program and as safetensors.",
    {
        "run=latest": "all formats, into the run's folder export/",
        "run=runs/NAME format=onnx precision=[float32,float16] out=FOLDER": "",
        "run=runs/NAME format=safetensors names=timm": "tensors under timm's names",
        "run=runs/NAME format=onnx register=NAME": "a version in MLflow's registry",
    },
    text_keys=("run", "out", "runs", "input", "register", "alias", "names"),
    minimums={"compare_images": 1, "val_images": 1, "batch_size": 1, "image_size": 1, "opset": MIN_OPSET},
    check_values=read_forms,
)


def main(config: DictConfig) -> None:
    """Write the files, compare each with the network, and register the ONNX file; failures exit with code 2."""
    forms = read_forms(config)
    with fast_imports():
        from pipeline.export.files import DifferentAnswersError, export_files
        from pipeline.runs.trained import load_model
        from pipeline.tracking.registry import RegistryError

    registry = _find_registry(config)
    with _failures(DifferentAnswersError, RegistryError):
        model = load_model(str(config.run), runs=str(config.runs), device="cpu", trust=bool(config.trust))
        if config.image_size is not None:
            _resize(model, config.image_size)
        folder = _default_folder(model.run) if config.out is None else Path(str(config.out))
        checks = _build_checks(config, model, forms=forms)
        exported = export_files(model, forms, folder=folder, checks=checks, opset=config.opset)
        notes = [model.calibration_advice] if model.calibration_advice else []
        notes += [model.run.unfinished] if model.run.unfinished else []
        _print(exported, folder, checks=checks, notes=notes)
        if registry is not None:
            file = folder / next(form.file_name for form in forms if form.format == ONNX)
            _register(config, model, file=file, tracker=registry, checks=checks)


def _default_folder(run: RestoredRun) -> Path:
    """Return the run's folder for exports; other weights than the best have a folder in it."""
    return run.run.export if run.is_best else run.run.export / run.weights_file.stem


def _resize(model: TrainedModel, image_size: ImageSize) -> None:
    """Evaluate crops of another size. Raises: ConfigError when the network or the crop does not take it."""
    import torch

    from data.augment.crops import EvaluationCrop
    from models.analysis.trace import FORWARD_ERRORS

    if not isinstance(model.crop, EvaluationCrop):
        raise ConfigError(f"image_size={image_size}: {type(model.crop).__name__} has only its own size")
    model.crop = replace(model.crop, image_size=image_size)
    try:
        model(torch.zeros(1, *model.size, 3, dtype=torch.uint8))
    except FORWARD_ERRORS as error:
        built_for = getattr(model.net, "image_size", model.run.image_size)
        reason = str(error).partition("\n")[0]
        network = f"{model.run.network}, built for {built_for} pixels"
        raise ConfigError(f"image_size={image_size} does not suit {network}: {reason}") from error


def _build_checks(config: DictConfig, model: TrainedModel, *, forms: list[Form]) -> Checks:
    from pipeline.export.files import Checks
    from pipeline.export.images import comparison_images, validation_data

    given = None if config.input is None else str(config.input)
    reports_accuracy = any(form.precision != "float32" for form in forms)
    dataset = validation_data(model) if given is None or reports_accuracy else None
    images = comparison_images(model, dataset, given=given, count=config.compare_images)
    tolerance = {str(name): float(value) for name, value in config.tolerance.items()}
    return Checks(images, tolerance, dataset if reports_accuracy else None, config.val_images, config.batch_size)


def _print(exported: Exported, folder: Path, *, checks: Checks, notes: list[str]) -> None:
    from rich.console import Console

    from models.weights.files import shorten
    from pipeline.cli.console import print_line

    console = Console()
    counts = {one.val_images for one in exported.files.values()}
    for name, one in exported.files.items():
        accuracy = "" if one.top1 is None else f", val top-1 {one.top1:.4f}"
        size, difference = f"{one.bytes / 1e6:.1f} MB", f"largest difference {one.largest_difference:.1e}"
        print_line(console, f"{folder / name}  {size}, {difference}{accuracy}")
    print_line(console, f"compared on {checks.images.description}")
    if exported.top1 is not None:
        (count,) = counts
        print_line(console, f"the network itself: val top-1 {exported.top1:.4f} on {count:,} images")
    notes = [*notes, *exported.notes]
    if exported.stale:
        notes.append(f"in {folder}, of another model or changed: {shorten(exported.stale)}; export them again")
    for note in notes:
        print_line(console, note)


def _find_registry(config: DictConfig) -> MLflowTracker | None:
    """Return the tracker whose registry gets the model, None without `register`. Raises: ConfigError without MLflow."""
    if config.register is None:
        return None
    from pipeline.build.objects import build_object
    from pipeline.tracking.mlflow_tracker import MLflowTracker
    from pipeline.tracking.tracker import Tracker

    tracker = build_object(config, "tracking", kind=Tracker)
    if not isinstance(tracker, MLflowTracker):
        raise ConfigError(f"register={config.register} needs tracking=mlflow")
    return tracker


def _register(config: DictConfig, model: TrainedModel, *, file: Path, tracker: MLflowTracker, checks: Checks) -> None:
    from rich.console import Console

    from pipeline.cli.console import print_line
    from pipeline.export.graph import INPUT, OUTPUT
    from pipeline.export.record import describe_model
    from pipeline.tracking.registry import ExportedModel, register

    example = checks.images.crops[:1].expand(2, -1, -1, -1)
    exported = ExportedModel(file, INPUT, OUTPUT, example.numpy(), model(example).numpy(), describe_model(model))
    registered = register(
        exported,
        str(config.register),
        alias=None if config.alias == "none" else str(config.alias),
        run=model.run.run,
        store=tracker.store,
    )
    console, variables = Console(), f"MLFLOW_TRACKING_URI={tracker.store.printed_address} MLFLOW_DISABLE_TELEMETRY=true"
    serve = f"{variables} mlflow models serve --env-manager local -m {registered.uri}"
    moved = f", {config.alias} moved there from version {registered.before}" if registered.before else ""
    lines = (f"registered as {registered.name} version {registered.version}{moved}", f"to serve it: {serve}")
    for line in lines:
        print_line(console, line)


@contextmanager
def _failures(*kinds: type[Exception]) -> Iterator[None]:
    """Print a failure as one line and exit with code 2."""
    try:
        yield
    except kinds as error:
        print(f"error: {mask_address(' '.join(str(error).split()))}", file=sys.stderr)
        raise SystemExit(FAILURE) from None


if __name__ == "__main__":
    run_verb(VERB, main)
