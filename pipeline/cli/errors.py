"""User errors: one line each, in the words of the command line, with the nearest valid word."""

import difflib
import errno
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]  # it has no stubs

from data.arguments import ArgumentError as DataArgumentError
from models.arguments import ArgumentError as ModelArgumentError
from pipeline.cli.secrets import mask_address
from pipeline.cli.signals import stop_signals

USER_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError, RecursionError)
LOST = re.compile("gloo|NCCL|nccl|Connection closed by peer|Connection reset|Socket|Broken pipe|rendezvous|TCPStore")
ERRNO = re.compile(r"\[Errno -?\d+\] ")
DEVICE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
USER_ERROR, FAILURE = 1, 2  # exit codes; those after signals are in `signals.EXIT_CODES`


class ConfigError(ValueError):
    """A mistake on the command line or in a config, explained in one sentence."""


class FailureError(Exception):
    """A failure that no other command line avoids, explained in one sentence: a full disk, a rank that was killed."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print an error as one line on stderr and exit with code 1 for user errors, 2 for failures.

    A bug exits with code 2 after its traceback. After a signal to stop, errors are taken for its consequences, except
    for failures, and the exit code is the signal's.
    """
    try:
        yield
    except BrokenPipeError:  # whoever read the output has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at exit
        raise SystemExit(USER_ERROR) from None
    except Exception as error:  # a bug too has an exit code
        stop_signals.finish()
        if stop_signals.exit_code is not None and not is_failure(error):
            raise SystemExit(stop_signals.exit_code) from None
        if isinstance(error, (*USER_ERRORS, FailureError)):
            print(f"error: {one_line(error)}", file=sys.stderr)
        else:
            traceback.print_exc()
        raise SystemExit(exit_code(error)) from error


def exit_code(error: BaseException) -> int:
    """Return the exit code of an error: 1 for what another command line avoids, else 2."""
    return USER_ERROR if isinstance(error, USER_ERRORS) and not is_failure(error) else FAILURE


def is_failure(error: BaseException) -> bool:
    """Whether an error is a failure that is explained in one sentence: that of a full, broken or silent disk too."""
    is_of_device = isinstance(error, OSError) and error.errno in DEVICE_ERRORS
    return is_of_device or isinstance(error, FailureError | TimeoutError)


def as_message(error: ValueError | OSError | FailureError) -> ValueError | FailureError:
    """Return an error that another rank can raise: its text, and whether it is a failure."""
    return FailureError(str(error)) if is_failure(error) else ValueError(str(error))


def is_of_lost_rank(error: BaseException) -> bool:
    """Whether an error of torch.distributed is most likely the consequence of another rank's end."""
    return isinstance(error, RuntimeError) and LOST.search(str(error)) is not None


def one_line(error: BaseException) -> str:
    """Return an error's message in one line, without passwords in addresses."""
    if isinstance(error, RecursionError):
        return "a config or a file is nested too deeply"
    cause = root_cause(error)
    text = str(cause if isinstance(error, HydraException) or isinstance(cause, ConfigError) else error)
    return mask_address(" ".join(ERRNO.sub("", text).split()))


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
