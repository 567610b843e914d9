"""Say what a network sees and what it costs: `python -m pipeline.report +model=resnet`, or `models=[resnet,vgg]`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from pipeline.cli.config import ConfigError, run_verb

if TYPE_CHECKING:
    from models.analysis.report import Report
    from pipeline.report.sample_images import Photographs
    from pipeline.report.target import Subject

LAYERS = ("some", "all", "none")


def main(config: DictConfig) -> None:
    """Print what was found of one network or of several, and write it as a page and as tables."""
    check_values(config)
    if config.models:
        compare(config)
    else:
        report_one(config)


def check_values(config: DictConfig) -> None:
    """Raise ConfigError for values that no report has, or of which one rules the other out."""
    if config.layers not in LAYERS:
        raise ConfigError(f"layers={config.layers} is not one of {', '.join(LAYERS)}")
    for name, least in {"batch_size": 1, "effective_images": 0}.items():
        value = least if config[name] is None else config[name]
        if not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value} must be a whole number, at least {least}")
    asked = {
        "+model=NAME": "model" in config,
        "net=FUNCTION": config.net is not None,
        "run=FOLDER": config.run is not None,
        "models=[NAME,...]": config.models,
    }
    if sum(map(bool, asked.values())) != 1:
        raise ConfigError(f"a report is of one of these: {', '.join(asked)}")
    told = config.weights
    if idle := [name for name in ("head", "stem", "skip") if told.file is None and told[name] not in ("keep", [])]:
        raise ConfigError(f"weights.{idle[0]}={told[idle[0]]} is for a file: add weights=FILE")
    alone = {"check=true": config.check, f"weights={config.weights.file}": config.weights.file is not None}
    for word, given in alone.items():
        if given and config.models:
            raise ConfigError(f"{word} is for the report of one network: leave it out beside models=")


def report_one(config: DictConfig) -> None:
    """The report of one network."""
    from pipeline.cli.console import table_console
    from pipeline.report import measure as reporting
    from pipeline.report.target import completed, folder_for, subject_of
    from pipeline.report.terminal import print_report

    config = completed(config)
    subject = subject_of(config)
    out = reporting.check_folder(folder_for(config, f"{subject.name}-{subject.image[-1]}"))
    shown = photographs_for(config, subject.image)
    report = find_out(config, subject, shown=shown)
    files = reporting.write(report, out, photograph=None if shown is None else shown.pixels[0])
    console = table_console()
    print_report(console, report, layers=config.layers)
    console.print(f"wrote {', '.join(map(str, files))}", highlight=False, soft_wrap=True)


def compare(config: DictConfig) -> None:
    """Several networks side by side, with how fast they are on this machine."""
    from hydra.core.hydra_config import HydraConfig

    from pipeline.cli.console import table_console
    from pipeline.report import measure as reporting
    from pipeline.report.speed import images_per_second
    from pipeline.report.target import config_of, folder_for, subject_of, with_weights
    from pipeline.report.terminal import print_comparison

    typed = [word for word in HydraConfig.get().overrides.task if not word.startswith("models=")]
    configs = [config_of(str(name), typed) for name in config.models]
    subjects = [subject_of(one) for one in configs]
    out = reporting.check_folder(folder_for(config, "comparison"))
    reports = [
        find_out(one, subject, shown=photographs_for(one, subject.image))
        for one, subject in zip(configs, subjects, strict=True)
    ]
    with working(f"images/s of {len(reports)} networks"):
        sizes = [report.inspection.image for report in reports]
        speeds = images_per_second([with_weights(one) for one in configs], sizes, batch_size=configs[0].batch_size)
    files = reporting.write_comparison(reports, out, images_per_second=speeds)
    console = table_console()
    print_comparison(console, reports, images_per_second=speeds)
    console.print(f"wrote {', '.join(map(str, files))}", highlight=False, soft_wrap=True)


def photographs_for(config: DictConfig, image: tuple[int, int, int]) -> Photographs | None:
    """What the effective field is measured on, None where it is not asked for."""
    from pipeline.report.sample_images import photographs

    if not config.effective_images:
        return None
    source = None if config.photographs is None else Path(str(config.photographs))
    return photographs(source, config.effective_images, size=image[1:])


def find_out(config: DictConfig, subject: Subject, *, shown: Photographs | None) -> Report:
    """All that is asked for of a network."""
    from hydra.utils import instantiate

    from pipeline.report import measure as reporting
    from pipeline.report.target import with_weights

    training = reporting.Training(config.batch_size, config.precision, instantiate(config.recipe).optimizer)
    with working(f"{subject.name}: layers"):
        report = reporting.report_on(subject.net, subject.name, image=subject.image, training=training)
    if config.check:
        with working(f"{subject.name}: gradients"):
            report = reporting.with_check(report, subject.net)
    if shown is None:
        return report
    with working(f"{subject.name}: effective field"):
        file = config.weights.file
        weights = None if file is None else f"weights of {file}"
        return reporting.with_effective_field(report, with_weights(config), shown=shown, weights=weights)


def working(on: str) -> AbstractContextManager[object]:
    """Show on a terminal, while the block runs, what takes its time."""
    from rich.console import Console

    return Console(stderr=True).status(on)


if __name__ == "__main__":
    run_verb("report", main)
