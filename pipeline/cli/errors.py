"""User errors: one line each, in the words of the command line, with the nearest valid word."""

import difflib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]  # it has no stubs

from data.arguments import ArgumentError as DataArgumentError
from models.arguments import ArgumentError as ModelArgumentError
from pipeline.cli.secrets import mask_address

INTERRUPTED = 128 + 2  # exit code, as a shell counts it: 128 + SIGINT


class ConfigError(ValueError):
    """A mistake on the command line or in a config, explained in one sentence."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a user error as one line on stderr and exit with code 1."""
    try:
        yield
    except BrokenPipeError:  # whoever read the output has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at exit
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except RecursionError:
        print("error: a config or a file is nested too deeply", file=sys.stderr)
        raise SystemExit(1) from None
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError) as error:
        cause = root_cause(error)
        text = str(cause if isinstance(error, HydraException) or isinstance(cause, ConfigError) else error)
        print(f"error: {mask_address(' '.join(text.split()))}", file=sys.stderr)
        raise SystemExit(1) from None


@contextmanager
def config_keys_in_errors(keys: Mapping[str, str]) -> Iterator[None]:
    """Replace the names of arguments by config keys in an ArgumentError: `root=x` becomes `data.root=x`.

    Code below the verbs names its own arguments; users need the keys that they can type.
    """
    try:
        yield
    except (ModelArgumentError, DataArgumentError) as error:
        error.args = tuple((keys.get(one[0], one[0]), one[1]) if isinstance(one, tuple) else one for one in error.args)
        raise


def root_cause(error: BaseException) -> BaseException:
    """Return the exception at the start of a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def nearest(word: str, words: Iterable[str], *, cutoff: float = 0.5) -> str:
    """Return ": did you mean WORD?" for the most similar of `words`, or an empty string."""
    similar = difflib.get_close_matches(word, list(words), n=1, cutoff=cutoff)
    return f": did you mean {similar[0]}?" if similar else ""
