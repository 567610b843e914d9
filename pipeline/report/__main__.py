"""Report a network's receptive fields and cost: `python -m pipeline.report +model=resnet`, or `models=[resnet,vgg]`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from pipeline.cli.check import ConfigError
from pipeline.cli.run import run_verb
from pipeline.cli.verb import Verb

if TYPE_CHECKING:
    from models.analysis.report import Report
    from pipeline.report.sample_images import SampleImages
    from pipeline.report.target import Target

VERB = Verb(
    "report",
    "Report a network's receptive fields, parameters and cost, layer by layer.",
    {
        "+model=resnet": "tables in the terminal, and a page with figures",
        "+model=resnet model.variant=resnet50 data.image_size=288 check=true": "",
        "run=runs/NAME": "the network of a run with its best weights",
        "net=timm.models.densenet121 trust=true": "another library's network, or your own",
        "models=[resnet,vgg.vgg11,convnext]": "a comparison",
    },
    required_group="model",
    alternatives=("models", "run", "net"),
    aliases={"weights": "weights.file"},
    text_keys=("weights.file",),
)
LAYER_CHOICES = ("some", "all", "none")
MINIMUM = {"batch_size": 1, "effective_images": 0}


def main(config: DictConfig) -> None:
    """Print the report of one network or a comparison of several, and write it as a page and as tables."""
    check_values(config)
    if config.models:
        compare(config)
    else:
        report_one(config)


def check_values(config: DictConfig) -> None:
    """Raise ConfigError for invalid values and for values that exclude each other."""
    if config.layers not in LAYER_CHOICES:
        raise ConfigError(f"layers={config.layers} is not one of {', '.join(LAYER_CHOICES)}")
    for name, minimum in MINIMUM.items():
        value = config[name]
        if value is not None and (not isinstance(value, int) or value < minimum):
            raise ConfigError(f"{name}={value} must be an integer, at least {minimum}")
    subjects = {
        "+model=NAME": "model" in config,
        "net=FUNCTION": config.net is not None,
        "run=FOLDER": config.run is not None,
        "models=[NAME,...]": bool(config.models),
    }
    if sum(subjects.values()) != 1:
        raise ConfigError(f"a report needs exactly one of {', '.join(subjects)}")
    single = {"check=true": config.check, f"weights={config.weights.file}": config.weights.file is not None}
    for word, is_given in single.items():
        if is_given and config.models:
            raise ConfigError(f"{word} is for the report of one network: leave it out with models=")


def report_one(config: DictConfig) -> None:
    """Report on one network."""
    from pipeline.cli.console import table_console
    from pipeline.report.measure import writable_folder, write_report
    from pipeline.report.target import output_folder, target_of
    from pipeline.report.terminal import print_report

    target = target_of(config)
    folder = writable_folder(output_folder(config, f"{target.name}-{target.image_shape[-1]}"))
    samples = samples_for(config, target)
    report = measure(config, target, samples=samples)
    files = write_report(report, folder, sample_image=None if samples is None else samples.pixels[0])
    console = table_console()
    print_report(console, report, layers=config.layers)
    console.print(f"wrote {', '.join(map(str, files))}", highlight=False, soft_wrap=True)


def compare(config: DictConfig) -> None:
    """Compare several networks, and their speed on this machine."""
    from hydra.core.hydra_config import HydraConfig

    from pipeline.cli.console import table_console
    from pipeline.report.measure import writable_folder, write_comparison
    from pipeline.report.speed import images_per_second
    from pipeline.report.target import output_folder, target_named
    from pipeline.report.terminal import print_comparison

    overrides = [word for word in HydraConfig.get().overrides.task if not word.startswith("models=")]
    targets = [target_named(str(name), overrides) for name in config.models]
    folder = writable_folder(output_folder(config, "comparison"))
    reports = [measure(config, target, samples=samples_for(config, target)) for target in targets]
    with status(f"images/s of {len(reports)} networks"):
        shapes = [target.image_shape for target in targets]
        batch_size = targets[0].training.batch_size
        speeds = images_per_second([target.load() for target in targets], shapes, batch_size=batch_size)
    files = write_comparison(reports, folder, images_per_second=speeds)
    console = table_console()
    print_comparison(console, reports, images_per_second=speeds)
    console.print(f"wrote {', '.join(map(str, files))}", highlight=False, soft_wrap=True)


def samples_for(config: DictConfig, target: Target) -> SampleImages | None:
    """Return the images for the effective field, None when it is not wanted."""
    from pipeline.report.sample_images import sample_images

    if not config.effective_images:
        return None
    source = None if config.photographs is None else Path(str(config.photographs))
    return sample_images(source, config.effective_images, size=target.image_shape[1:])


def measure(config: DictConfig, target: Target, *, samples: SampleImages | None) -> Report:
    """Measure everything that the config asks for."""
    from pipeline.report.measure import check_with_gradient, measure_effective_field, measure_network

    with status(f"{target.name}: layers"):
        report = measure_network(target.skeleton, target.name, image_shape=target.image_shape, training=target.training)
    if config.check:
        with status(f"{target.name}: gradients"):
            report = check_with_gradient(report, target.skeleton)
    if samples is None:
        return report
    with status(f"{target.name}: effective field"):
        return measure_effective_field(report, target.load(), samples=samples, weights=target.weights)


def status(text: str) -> AbstractContextManager[object]:
    """Show on a terminal what takes its time while the block runs."""
    from rich.console import Console

    return Console(stderr=True).status(text)


if __name__ == "__main__":
    run_verb(VERB, main)
