"""Run a verb: check the command line, compose the config, call its `main`.

A verb's module states its rules in a `Verb` and ends in

    if __name__ == "__main__":
        run_verb(VERB, main)

It imports nothing heavy at its top, so that `--help` and mistakes on the command line are answered at once.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import hydra
from omegaconf import DictConfig, ListConfig, OmegaConf

from data.children import end_with_parent
from pipeline.cli.check import HELP, check_command_line, overrides_in
from pipeline.cli.compose import CONF, check_trust
from pipeline.cli.environment import check_server
from pipeline.cli.errors import FAILURE, ConfigError, one_line_errors
from pipeline.cli.targets import check_targets
from pipeline.cli.verb import Verb, help_text

# Keys that others replace.
OUTRANKED: Mapping[str, tuple[str, ...]] = {
    "recipe.warmup": ("recipe.warmup_epochs", "recipe.warmup_steps"),
    "recipe.base_lr": ("recipe.optimizer.lr",),
    "recipe.epochs": ("budget",),
}


@contextmanager
def fast_imports() -> Iterator[None]:
    """Pause garbage collection, which takes a fifth of the time of torch's imports and finds nothing."""
    if "torch" in sys.modules:  # a later job of a sweep, whose garbage must not be frozen
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # later collections skip what stands now
        gc.enable()


@contextmanager
def ended_by_timeouts() -> Iterator[None]:
    """End the process after a timeout, because Python would first wait for the threads that wait for the disk."""
    try:
        yield
    except SystemExit as ended:
        if isinstance(ended.__cause__, TimeoutError):
            sys.stdout.flush()
            os._exit(FAILURE)
        raise


def check_config(config: DictConfig, overrides: Sequence[str], *, verb: Verb) -> None:
    """Check what a config makes of its overrides: trust, targets, tracking server, values. Raises: ConfigError."""
    check_trust(config, overrides)
    check_targets(config)
    if not config.get("trust") and not any(word.startswith("tracking.uri=") for word in overrides):
        check_server(OmegaConf.select(config, "tracking.uri"))
    for key, minimum in verb.minimums.items():
        value = OmegaConf.select(config, key)
        is_pair = key.endswith("image_size") and isinstance(value, ListConfig) and len(value) == 2
        for number in value if is_pair else [value]:
            if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < minimum):
                raise ConfigError(f"{key}={value} must be an integer of at least {minimum}")
    out = config.get("out")
    if out is not None and verb.out_is_folder and (out == "" or Path(str(out)).is_file()):
        raise ConfigError(f"out={out} {'is a file' if out else 'has no value'}: give a folder")
    _check_that_all_count(config, overrides)
    if verb.check_values is not None:
        verb.check_values(config)


def _check_that_all_count(config: DictConfig, overrides: Sequence[str]) -> None:
    """Raise ConfigError for a value that does not count, because another key decides."""
    typed = {word.lstrip("+").partition("=")[0] for word in overrides}
    for key, deciding in OUTRANKED.items():
        if key not in typed or OmegaConf.select(config, key) is None:
            continue
        for other in deciding:
            if (value := OmegaConf.select(config, other)) is not None:
                raise ConfigError(f"{key} does not count beside {other}={value}: leave one of them out")


def run_verb(verb: Verb, main: Callable[[DictConfig], None]) -> None:
    """Check the command line, compose the config and call `main`; user errors exit with code 1."""
    end_with_parent()  # a rank that Lightning has started
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings about a lost rank have 20 lines of addresses
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints three more lines and exits

    def guarded(config: DictConfig) -> None:  # errors must not reach Hydra, which adds a line to them
        with one_line_errors():
            check_config(config, overrides, verb=verb)
            main(config)

    with ended_by_timeouts(), one_line_errors():
        with fast_imports():
            arguments = check_command_line(verb, sys.argv[1:])
        if set(HELP) & set(arguments):  # Hydra's own help lists every group of the project twice, which takes longer
            print(help_text(verb, overrides_in(arguments)))
            return
        overrides = overrides_in(arguments)
        sys.argv[1:] = arguments
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=verb.name)(guarded)()
