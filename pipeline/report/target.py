"""What a report is of: a network and its images, by a config, by a name in a comparison, by the folder of a run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from models.weights.load import load_weights
from pipeline.cli.config import CONF, check_targets, compose, flatten, nearest
from pipeline.runs.run import FINGERPRINT

OF_A_RUN = ("model", "recipe")  # what a report takes of the config that a run keeps
# A run's folder may be somebody else's: fewer targets are taken from it than from what is typed.
TRUSTED_IN_RUNS = ("models.", "torch.optim.", "torchvision.models.")


class Subject(NamedTuple):
    """A network without its weights, on the meta device, by name, and its images (C, H, W)."""

    name: str
    net: nn.Module
    image: tuple[int, int, int]


def completed(config: DictConfig) -> DictConfig:
    """The config of a report with its model, where it names a run or a function instead, and what is left to it.

    Raises: FileNotFoundError for a run that is not there; ConfigError for a function from outside.
    """
    config = config.copy()
    if config.run is not None:
        config = of_run(config)
    elif config.net is not None:
        with open_dict(config):
            config.update({"model": {"_target_": config.net}, "classifier": None})
    config.batch_size = config.batch_size or 32
    config.precision = config.precision or "32-true"
    check_targets(config)
    return config


def of_run(config: DictConfig) -> DictConfig:
    """The config of a report with the network of a run, the size of its images and batches, and its best weights.

    Raises: FileNotFoundError for a folder that is no run's, or has no checkpoint yet; ConfigError.
    """
    folder = Path(str(config.run))
    for name in ("config.yaml", FINGERPRINT):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"run={folder}: there is no run, which would have a {name}")
    begun = OmegaConf.load(folder / "config.yaml")
    if not isinstance(begun, DictConfig):
        raise FileNotFoundError(f"run={folder}: its config.yaml is no config of a training")
    checkpoints = [folder / "checkpoints" / name for name in ("best.ckpt", "last.ckpt")]
    written = [path for path in checkpoints if path.is_file()]
    if config.weights.file is None and not written:
        raise FileNotFoundError(f"run={folder}: there is no checkpoint yet: weights=FILE takes other weights")
    computed = json.loads((folder / FINGERPRINT).read_text())
    taken = OmegaConf.create({key: begun[key] for key in OF_A_RUN})
    if not config.trust:
        check_targets(taken, among=TRUSTED_IN_RUNS)
    with open_dict(config):
        config.update(taken)
    config.data.image_size = config.data.image_size or begun.data.image_size
    config.batch_size = config.batch_size or begun.data.batch_size
    config.precision = config.precision or computed["precision"]
    config.weights.file = config.weights.file or str(written[0])
    return config


def config_of(name: str, typed: list[str]) -> DictConfig:
    """The config of one network of a comparison, with all else that was typed.

    A name is an architecture, ARCHITECTURE.VARIANT, or the function that builds the network.
    Raises: ValueError for an architecture that does not exist.
    """
    architecture, _, variant = name.partition(".")
    known = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
    if variant and architecture not in known:
        return completed(compose("report", [f"net={name}", *typed]))
    if architecture not in known:
        raise ValueError(f"models: {name} is not one of {', '.join(known)}{nearest(architecture, known)}")
    chosen = [f"+model={architecture}", *([f"model.variant={variant}"] if variant else [])]
    return completed(compose("report", [*chosen, *typed]))


def subject_of(config: DictConfig) -> Subject:
    """The network of a config. Raises: ValueError where nothing says how large its images are."""
    try:
        with torch.device("meta"):
            net = _built(config)
    except (RuntimeError, InstantiationException):  # it computes with numbers while it is built
        net = _built(config)
    channels, published = int(config.model.get("in_channels", 3)), getattr(net, "image_size", None)
    by_timm = getattr(net, "default_cfg", None)
    if published is None and isinstance(by_timm, dict):
        channels, published, _ = by_timm["input_size"]
    size = config.data.image_size or published
    if not isinstance(size, int):
        raise ValueError("this network is for images of no size in particular: add data.image_size=PIXELS")
    name = str(config.model.get("variant", config.model._target_))
    return Subject(name, net, (channels, size, size))


def with_weights(config: DictConfig) -> nn.Module:
    """The network with the weights of its file, or with the first ones of a training with this seed.

    Raises: FileNotFoundError, ValueError when the file does not fit.
    """
    torch.manual_seed(config.seed)
    net, told = _built(config), config.weights
    if told.file is None and config.classifier is not None:
        num_classes = config.model.get("num_classes") or 1000
        instantiate(config.classifier, net=net, num_classes=num_classes, recipe=instantiate(config.recipe))
    if told.file is None:
        return net
    options = {"head": told.head, "stem": told.stem, "skip": list(told.skip)}
    load_weights(net, Path(str(told.file)), norm_eps=config.model.get("norm_eps"), **options)
    return net


def folder_for(config: DictConfig, name: str) -> Path:
    """Where what is written goes; unless that is told, eight digits stand for all values that change what it says."""
    if config.out is not None:
        return Path(str(config.out))
    meant = {key: value for key, value in flatten(config).items() if key not in ("out", "layers", "trust")}
    digest = hashlib.sha256(json.dumps(meant, sort_keys=True, default=str).encode()).hexdigest()
    return Path("" if config.run is None else str(config.run), "reports", f"{name}-{digest[:8]}")


def _built(config: DictConfig) -> nn.Module:
    net = instantiate(config.model)
    if not isinstance(net, nn.Module):
        raise ValueError(f"{config.model._target_} builds no network: {type(net).__name__}")
    return net
