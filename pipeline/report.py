"""Say what a network sees and what it costs: `python -m pipeline.report +model=resnet`, or `models=[resnet,vgg]`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from pipeline.config import CONF, compose, nearest, run_verb

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from models.report import Report

LAYERS = ("some", "all", "none")


def main(config: DictConfig) -> None:
    """Print what was found of one network or of several, and write it as a page and as tables."""
    if config.layers not in LAYERS:
        raise ValueError(f"layers={config.layers} is not one of {', '.join(LAYERS)}")
    for name, least in {"batch_size": 1, "effective_images": 0}.items():
        if config[name] < least:
            raise ValueError(f"{name}={config[name]} must be at least {least}")
    if config.models:
        compare(config)
    else:
        report_one(config)


def report_one(config: DictConfig) -> None:
    """The report of one network."""
    from rich.console import Console

    from pipeline import reporting
    from pipeline.terminal import print_report

    report, photograph = find_out(config)
    out = folder_for(config, report.name)
    console = Console()
    print_report(console, report, layers=config.layers)
    files = reporting.write(report, out, photograph=photograph)
    console.print(f"wrote {', '.join(map(str, files))}", highlight=False, soft_wrap=True)


def compare(config: DictConfig) -> None:
    """Several networks side by side, with how fast they are on this machine."""
    from hydra.core.hydra_config import HydraConfig
    from rich.console import Console

    from pipeline import reporting
    from pipeline.speed import images_per_second
    from pipeline.terminal import print_comparison

    typed = [word for word in HydraConfig.get().overrides.task if not word.startswith("models=")]
    configs = [config_of(str(name), typed) for name in config.models]
    reports = [find_out(one)[0] for one in configs]
    sizes = [report.inspection.image for report in reports]
    speeds = images_per_second([build(one) for one in configs], sizes, batch_size=int(config.batch_size))
    console = Console()
    print_comparison(console, reports, images_per_second=speeds)
    files = reporting.write_comparison(reports, folder_for(config, "comparison"), images_per_second=speeds)
    console.print(f"wrote {', '.join(map(str, files))}", highlight=False, soft_wrap=True)


def config_of(name: str, typed: list[str]) -> DictConfig:
    """The config of one network of a comparison, by architecture or ARCHITECTURE.VARIANT, with all else that was typed.

    Raises: ValueError for an architecture that does not exist.
    """
    architecture, _, variant = name.partition(".")
    known = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
    if architecture not in known:
        raise ValueError(f"models: {name} is not one of {', '.join(known)}{nearest(architecture, known)}")
    return compose("report", [f"+model={architecture}", *([f"model.variant={variant}"] if variant else []), *typed])


def find_out(config: DictConfig) -> tuple[Report, NDArray[np.uint8] | None]:
    """All that is asked for of the network of a config, and the photograph beside its effective field."""
    import torch
    from hydra.utils import instantiate

    from pipeline import reporting

    with torch.device("meta"):
        net = build(config)
    size = config.data.image_size or getattr(net, "image_size", None)
    if not isinstance(size, int):
        raise ValueError("this network is for images of no size in particular: add data.image_size=PIXELS")
    training = reporting.Training(config.batch_size, config.precision, instantiate(config.recipe).optimizer)
    image = (int(config.model.get("in_channels", 3)), size, size)
    name = str(config.model.get("variant", config.model._target_))
    report = reporting.report_on(net, name, image=image, training=training)
    if config.check:
        report = reporting.with_check(report, net)
    if not config.effective_images:
        return report, None
    folder = None if config.photographs is None else Path(str(config.photographs))
    trained = config.weights.file is not None
    net = with_weights(config)
    return reporting.with_effective_field(report, net, count=config.effective_images, folder=folder, trained=trained)


def build(config: DictConfig) -> nn.Module:
    """The network of a config with its first weights, drawn from the seed."""
    import torch
    from hydra.utils import instantiate
    from torch import nn

    torch.manual_seed(config.seed)
    net = instantiate(config.model)
    assert isinstance(net, nn.Module)
    return net


def with_weights(config: DictConfig) -> nn.Module:
    """The network with the weights of its file, where there is one.

    Raises: FileNotFoundError, ValueError when the file does not fit.
    """
    from models.weights import load_weights

    net, told = build(config), config.weights
    if told.file is not None:
        options = {"head": told.head, "stem": told.stem, "skip": list(told.skip)}
        load_weights(net, Path(str(told.file)), norm_eps=config.model.get("norm_eps"), **options)
    return net


def folder_for(config: DictConfig, name: str) -> Path:
    """Where what is written goes."""
    return Path("reports", name) if config.out is None else Path(str(config.out))


if __name__ == "__main__":
    run_verb("report", main)
