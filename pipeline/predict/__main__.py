"""Classify images with a trained run: `python -m pipeline.predict run=latest input=photos`."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from pipeline.cli.errors import FAILURE, ConfigError
from pipeline.cli.run import fast_imports, run_verb
from pipeline.cli.verb import Verb

if TYPE_CHECKING:
    from pipeline.runs.trained import TrainedModel

MAX_BATCH_SIZE = 65_536  # images of a batch, classes of a row


def check_values(config: DictConfig) -> None:
    """Raise ConfigError for numbers that no prediction can have, whichever run it is of."""
    for name in ("top", "batch_size"):
        if not isinstance(config[name], int) or not 1 <= config[name] <= MAX_BATCH_SIZE:
            raise ConfigError(f"{name}={config[name]} must be an integer from 1 to {MAX_BATCH_SIZE:,}")


VERB = Verb(
    "predict",
    "Classify images with a trained run.",
    {
        "run=latest input=photos": "a folder: CSV on standard output",
        "run=runs/NAME input='photos/*.jpg' out=answers.parquet top=3": "",
        "run=latest input=-": "paths on standard input",
    },
    text_keys=("run", "input", "out", "runs", "device"),
    out_is_folder=False,
    check_values=check_values,
)


def main(config: DictConfig) -> None:
    """Write a row for each image; exit with code 2 if some could not be read."""
    with fast_imports():
        from rich.console import Console
        from rich.progress import track

        from data.loading.inputs import count_ignored_files, find_images
        from data.memory import memory_errors
        from pipeline.cli.console import print_line
        from pipeline.predict.rows import check_output, row_writer
        from pipeline.runs.trained import load_model

    console, out = Console(stderr=True), None if config.out is None else Path(str(config.out))
    check_output(out, source=Path(str(config.input)))
    model = load_model(str(config.run), runs=str(config.runs), device=config.device, trust=bool(config.trust))
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a path may have bytes that are no text
    sources = find_images(str(config.input), lines=sys.stdin)
    print_line(console, _describe(model))
    if model.run.unfinished:
        print_line(console, model.run.unfinished)
    count, unreadable, start = 0, 0, time.perf_counter()
    with memory_errors(config.batch_size), row_writer(out, top=min(config.top, len(model.classes))) as write:
        predictions = model.predict_sources(sources, batch_size=config.batch_size)
        for prediction in track(predictions, "images", console=console, transient=True, disable=out is None):
            write(prediction)
            count, unreadable = count + 1, unreadable + (prediction.error is not None)
    seconds = time.perf_counter() - start
    if ignored := count_ignored_files(Path(str(config.input))):  # at the end: a large folder would delay the first row
        counts = ", ".join(f"{number:,} {suffix}" for suffix, number in ignored.most_common())
        print_line(console, f"ignored files: {counts}")
    failed = f", {unreadable:,} unreadable" if unreadable else ""
    print_line(console, f"{count:,} images in {seconds:.1f} s ({count / seconds:,.0f}/s){failed}")
    if unreadable:
        raise SystemExit(FAILURE)


def _describe(model: TrainedModel) -> str:
    """The run, its weights and its calibration."""
    threshold, temperature = model.calibration.threshold, model.calibration.temperature
    unsure = "no threshold" if threshold is None else f"unsure below {threshold:.3f}"
    fitted = model.calibration_advice or f"temperature {temperature:.2f}, {unsure}"
    return f"{model.run.run.folder}, {model.run.weights_file.name}, {model.run.network}; {fitted}"


if __name__ == "__main__":
    run_verb(VERB, main)
