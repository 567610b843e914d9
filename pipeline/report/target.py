"""The network that a report is about, its images and its weights, from a config, a run or a function."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from data.augment.crops import height_and_width
from pipeline.build.network import build_module, build_network, build_recipe, build_without_values, network_name
from pipeline.build.objects import build_object
from pipeline.build.weights import WeightsFile
from pipeline.cli.compose import choices, compose, flatten
from pipeline.cli.errors import config_keys_in_errors, nearest
from pipeline.cli.targets import check_targets
from pipeline.report.measure import TrainingSettings
from pipeline.runs.find import FoundRun, find_run
from pipeline.runs.restore import RestoredRun

BATCH_SIZE, PRECISION, NUM_CLASSES = 32, "32-true", 1000  # where nothing says otherwise
NOT_IN_FOLDER_NAME = ("out", "layers", "trust", "runs")


@dataclass(frozen=True)
class Target:
    """A network to report on."""

    name: str
    skeleton: nn.Module  # shapes without values where the network allows it
    image_shape: tuple[int, int, int]
    training: TrainingSettings
    weights: str | None  # describes what `load` loads, None for newly initialised weights
    load: Callable[[], nn.Module]


def target_of(config: DictConfig) -> Target:
    """Return the target of `run=`, `net=` or `+model=`. Raises: FileNotFoundError, ValueError, ConfigError."""
    if config.run is not None:
        return _target_of_run(config)
    if config.net is not None:
        config = OmegaConf.create({**config, "model": {"_target_": config.net}, "classifier": None})
        check_targets(config)
    with config_keys_in_errors({"model._target_": "net"} if config.net is not None else {}):
        return _target_of_model(config)


def target_named(name: str, overrides: Sequence[str]) -> Target:
    """Return the target ARCHITECTURE, ARCHITECTURE.VARIANT, or function that builds a network. Raises: ValueError."""
    architecture, _, variant = name.partition(".")
    known = choices("model")
    if variant and architecture not in known:
        return target_of(compose("report", [f"net={name}", *overrides]))
    if architecture not in known:
        raise ValueError(f"models: {name} is not one of {', '.join(known)}{nearest(architecture, known)}")
    chosen = [f"+model={architecture}", *([f"model.variant={variant}"] if variant else [])]
    config = compose("report", [*chosen, *overrides])
    check_targets(config)
    return target_of(config)


def output_folder(config: DictConfig, name: str) -> Path:
    """Return the output folder: `out` if given, otherwise the name plus a hash of the settings."""
    if config.out is not None:
        return Path(str(config.out))
    settings = {key: value for key, value in flatten(config).items() if key not in NOT_IN_FOLDER_NAME}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    folder = Path("reports") if config.run is None else _find_run(config).run.reports
    return folder / f"{name}-{digest[:8]}"


def _target_of_model(config: DictConfig) -> Target:
    weights = build_object(config, "weights", kind=WeightsFile)
    skeleton = build_without_values(lambda: build_network(config))
    channels, published = int(config.model.get("in_channels", 3)), getattr(skeleton, "image_size", None)
    timm_config = getattr(skeleton, "default_cfg", None)
    if published is None and isinstance(timm_config, dict):
        channels, published, _ = timm_config["input_size"]
    size = config.data.image_size or published
    if size is None:
        raise ValueError(f"{network_name(config)} is not built for one image size: add data.image_size=PIXELS")

    def load() -> nn.Module:
        torch.manual_seed(config.seed)
        net = build_network(config)
        if weights.file is not None:
            weights.load_into(net, norm_eps=config.model.get("norm_eps"))
        elif config.classifier is not None:
            num_classes = config.model.get("num_classes") or NUM_CLASSES
            build_module(config, net, num_classes=num_classes, recipe=build_recipe(config))
        return net

    optimizer = build_recipe(config).optimizer_factory()
    training = TrainingSettings(config.batch_size or BATCH_SIZE, config.precision or PRECISION, optimizer)
    return Target(
        network_name(config), skeleton, (channels, *height_and_width(size)), training, weights.description, load
    )


def _find_run(config: DictConfig) -> FoundRun:
    return find_run(str(config.run), runs=Path(str(config.runs)))


def _target_of_run(config: DictConfig) -> Target:
    found = _find_run(config)
    run = RestoredRun(found.run.folder, trust=bool(config.trust), checkpoint=found.checkpoint)
    given = build_object(config, "weights", kind=WeightsFile)
    weights = WeightsFile(str(run.weights_file)) if given.file is None else given
    size = config.data.image_size or run.image_size

    def load() -> nn.Module:
        torch.manual_seed(config.seed)  # for tensors that weights.skip leaves out
        net = run.build_network()
        weights.load_into(net, norm_eps=run.norm_eps)
        return net

    optimizer, image_shape = run.build_recipe().optimizer_factory(), (run.in_channels, *height_and_width(size))
    training = TrainingSettings(config.batch_size or run.batch_size, config.precision or run.precision, optimizer)
    skeleton = build_without_values(run.build_network)
    return Target(run.network, skeleton, image_shape, training, weights.description, load)
