"""Report a network's receptive fields and cost: `python -m pipeline.report +model=resnet`, or `models=[resnet,vgg]`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from pipeline.cli.errors import ConfigError
from pipeline.cli.run import fast_imports, run_verb
from pipeline.cli.verb import Verb

if TYPE_CHECKING:
    from models.analysis.report import Report
    from pipeline.report.target import Target

LAYER_CHOICES = ("some", "all", "none")


def check_values(config: DictConfig) -> None:
    """Raise ConfigError for values that no report can have, whichever network it is of."""
    if config.layers not in LAYER_CHOICES:
        raise ConfigError(f"layers={config.layers} is not one of {', '.join(LAYER_CHOICES)}")
    subjects = ("model" in config, config.net is not None, config.run is not None, bool(config.models))
    if sum(subjects) != 1:
        raise ConfigError("a report needs exactly one of +model=NAME, net=FUNCTION, run=FOLDER, models=[NAME,...]")
    if config.models and (config.check or config.weights.file is not None):
        word = "check=true" if config.check else f"weights={config.weights.file}"
        raise ConfigError(f"{word} is for the report of one network: leave it out with models=")
    if config.weights.file is not None and not config.effective_images:
        raise ConfigError(
            f"weights={config.weights.file} is for the effective field, which effective_images=0 leaves out"
        )


VERB = Verb(
    "report",
    "Report a network's receptive fields, parameters and cost, layer by layer.",
    {
        "+model=resnet": "tables in the terminal, and a page with figures",
        "+model=resnet model.variant=resnet50 data.image_size=288 check=true": "",
        "run=runs/NAME": "a trained run, with its best weights",
        "net=timm.models.densenet121 trust=true": "another library's network, or your own",
        "models=[resnet,vgg.vgg11,convnext]": "a comparison",
    },
    required_group="model",
    alternatives=("models", "run", "net"),
    aliases={"weights": "weights.file"},
    text_keys=("weights.file", "run", "runs", "out", "photographs"),
    minimums={"batch_size": 1, "effective_images": 0, "data.image_size": 1},
    check_values=check_values,
)


def main(config: DictConfig) -> None:
    """Print the report of one network or a comparison of several, and write it as a page and as tables."""
    if config.models:
        _compare(config)
    else:
        report_one(config)


def report_one(config: DictConfig) -> None:
    """Report on one network."""
    with fast_imports():
        from pipeline.cli.console import print_line, table_console
        from pipeline.report.measure import writable_folder, write_report
        from pipeline.report.target import output_folder, target_of
        from pipeline.report.terminal import print_report

    target = target_of(config)
    folder = writable_folder(output_folder(config, f"{target.name}-{target.image_shape[-1]}"))
    report = _measure(config, target)
    files = write_report(report, folder)
    console = table_console()
    print_report(console, report, layers=config.layers)
    print_line(console, f"wrote {', '.join(map(str, files))}")


def _compare(config: DictConfig) -> None:
    with fast_imports():
        from hydra.core.hydra_config import HydraConfig

        from pipeline.cli.console import print_line, table_console
        from pipeline.report.measure import measure_speed, writable_folder, write_comparison
        from pipeline.report.target import output_folder, target_named
        from pipeline.report.terminal import print_comparison

    overrides = [word for word in HydraConfig.get().overrides.task if not word.startswith("models=")]
    targets = [target_named(str(name), overrides) for name in config.models]
    folder = writable_folder(output_folder(config, "comparison"))
    reports = [_measure(config, target) for target in targets]
    with _status(f"images/s of {len(reports)} networks"):
        nets, shapes = [target.load() for target in targets], [target.image_shape for target in targets]
        speeds = measure_speed(nets, shapes, batch_size=targets[0].training.batch_size)
    files = write_comparison(reports, folder, images_per_second=speeds)
    console = table_console()
    print_comparison(console, reports, images_per_second=speeds)
    print_line(console, f"wrote {', '.join(map(str, files))}")


def _measure(config: DictConfig, target: Target) -> Report:
    from pipeline.report.measure import check_with_gradient, measure_effective_field, measure_network
    from pipeline.report.sample_images import sample_images

    source, count = None if config.photographs is None else Path(str(config.photographs)), config.effective_images
    samples = sample_images(source, count, size=target.image_shape[1:]) if count else None
    with _status(f"{target.name}: layers"):
        report = measure_network(target.skeleton, target.name, image_shape=target.image_shape, training=target.training)
    if config.check:
        with _status(f"{target.name}: gradients"):
            report = check_with_gradient(report, target.skeleton)
    if samples is None:
        return report
    with _status(f"{target.name}: effective field"):
        return measure_effective_field(report, target.load(), samples=samples, weights=target.weights)


def _status(text: str) -> AbstractContextManager[object]:
    from rich.console import Console

    return Console(stderr=True).status(text)


if __name__ == "__main__":
    run_verb(VERB, main)
