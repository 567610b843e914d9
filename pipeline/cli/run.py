"""Run a verb: check the command line, compose the config, and turn user errors into one line.

A verb's module states its rules in a `Verb` and ends in

    if __name__ == "__main__":
        run_verb(VERB, main)

It imports nothing heavy at its top, so that `--help` and mistakes on the command line are answered at once.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pipeline.cli.check import check_command_line, check_targets
from pipeline.cli.compose import CONF
from pipeline.cli.verb import Verb, help_text

HELP = {"--help", "-h"}


def run_verb(verb: Verb, main: Callable[[DictConfig], None]) -> None:
    """Check the command line, compose the config and call `main`; user errors exit with code 1."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints three more lines and exits

    def guarded(config: DictConfig) -> None:  # errors must not reach Hydra, which adds a line to them
        with one_line_errors():
            check_targets(config)
            main(config)

    with one_line_errors():
        arguments = check_command_line(verb, sys.argv[1:])
        if HELP & set(arguments):  # Hydra's own lists every group of the project twice, which takes longer
            print(help_text(verb, [word for word in arguments if not word.startswith("-")]))
            return
        sys.argv[1:] = arguments
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=verb.name)(guarded)()


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a user error as one line and exit with code 1."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        exit_with(root_cause(error) if isinstance(error, HydraException) else error)


def exit_with(error: BaseException | str) -> NoReturn:
    """Print an error as one line on stderr and exit with code 1."""
    text = " ".join(str(error).split())
    print(f"error: {text}", file=sys.stderr)
    raise SystemExit(1)


def root_cause(error: BaseException) -> BaseException:
    """Return the exception at the start of a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def config_keys_in_errors(keys: Mapping[str, str]) -> Iterator[None]:
    """Replace parameter names by config keys in errors raised inside the block: `root=x` becomes `data.root=x`.

    Code below the verbs names its own parameters; users need the keys that they can type.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        error.args = (with_config_keys(str(error), keys),)
        raise


def with_config_keys(text: str, keys: Mapping[str, str]) -> str:
    """Replace `parameter=` by `key=` in a text."""
    pattern = rf"(?<![\w.+])({'|'.join(map(re.escape, keys))})="
    return re.sub(pattern, lambda match: f"{keys[match[1]]}=", text) if keys else text
