"""What a report is of: a network and its images, by a config, by a name in a comparison, by the folder of a run."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from models.weights import load_weights
from pipeline.config import CONF, check_targets, compose, nearest

OF_A_RUN = ("model", "classifier", "recipe", "seed")  # what a report takes of the config that a run keeps


class Subject(NamedTuple):
    """A network without its weights, on the meta device, by name, and its images (C, H, W)."""

    name: str
    net: nn.Module
    image: tuple[int, int, int]


def completed(config: DictConfig) -> DictConfig:
    """The config of a report with its model, where it names a run or a function instead.

    Raises: FileNotFoundError for a run that is not there; ConfigError for a function from outside.
    """
    if config.run is not None:
        return of_run(config)
    if config.net is None:
        return config
    config = config.copy()
    with open_dict(config):
        config.update({"model": {"_target_": config.net}, "classifier": None})
    check_targets(config)
    return config


def of_run(config: DictConfig) -> DictConfig:
    """The config of a report with the network of a run, the size of its images, and its best weights.

    Raises: FileNotFoundError for a folder that is no run's, or has no checkpoint yet; ConfigError.
    """
    folder = Path(str(config.run))
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"run={folder}: there is no run, which would have a config.yaml")
    begun = OmegaConf.load(folder / "config.yaml")
    assert isinstance(begun, DictConfig)
    checkpoints = [folder / "checkpoints" / name for name in ("best.ckpt", "last.ckpt")]
    written = [path for path in checkpoints if path.is_file()]
    if config.weights.file is None and not written:
        raise FileNotFoundError(f"run={folder}: there is no checkpoint yet: weights=FILE takes other weights")
    config = config.copy()
    with open_dict(config):
        config.update({key: begun[key] for key in OF_A_RUN})
    config.data.image_size = config.data.image_size or begun.data.image_size
    config.weights.file = config.weights.file or str(written[0])
    check_targets(config)
    return config


def config_of(name: str, typed: list[str]) -> DictConfig:
    """The config of one network of a comparison, with all else that was typed.

    A name is an architecture, ARCHITECTURE.VARIANT, or the function that builds the network.
    Raises: ValueError for an architecture that does not exist.
    """
    architecture, _, variant = name.partition(".")
    if "." in variant:
        return completed(compose("report", [f"net={name}", *typed]))
    known = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
    if architecture not in known:
        raise ValueError(f"models: {name} is not one of {', '.join(known)}{nearest(architecture, known)}")
    return compose("report", [f"+model={architecture}", *([f"model.variant={variant}"] if variant else []), *typed])


def subject_of(config: DictConfig) -> Subject:
    """The network of a config. Raises: ValueError where nothing says how large its images are."""
    with torch.device("meta"):
        net = _built(config)
    channels, published = int(config.model.get("in_channels", 3)), getattr(net, "image_size", None)
    by_timm = getattr(net, "default_cfg", None)
    if published is None and isinstance(by_timm, dict):
        channels, published, _ = by_timm["input_size"]
    size = config.data.image_size or published
    if not isinstance(size, int):
        raise ValueError("this network is for images of no size in particular: add data.image_size=PIXELS")
    name = str(config.model.get("variant", config.model._target_.rpartition(".")[2]))
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
    """Where what is written goes: reports of other networks, sizes and files of weights lie apart."""
    if config.out is not None:
        return Path(str(config.out))
    if config.run is not None:
        return Path(str(config.run), "report")
    file = config.weights.file
    return Path("reports", name if file is None else f"{name}-{Path(str(file)).stem}")


def _built(config: DictConfig) -> nn.Module:
    net = instantiate(config.model)
    if not isinstance(net, nn.Module):
        raise ValueError(f"{config.model._target_} builds no network: {type(net).__name__}")
    return net
