"""The ends of a training that are not its success."""

import signal
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.cli.errors import FailureError, exit_code, is_failure, one_line
from pipeline.cli.signals import EXIT_CODES, stop_signals
from pipeline.runs.run import NONFINITE
from pipeline.runs.status import State


class Ending(NamedTuple):
    """How a training has ended, for `status.json`."""

    state: State
    reason: str = ""
    exit_code: int = 0


class Stopped(SystemExit):  # no error
    """A signal has stopped the training, on every rank after the same step, whose state is saved."""

    def __init__(self, number: signal.Signals, *, step: int) -> None:
        super().__init__(EXIT_CODES[number])
        self.signal, self.step = number, step


class RanksDifferError(ValueError):
    """The ranks of a training have different settings or data. Raised on every rank."""


class DivergedError(FailureError):
    """A loss or a gradient is not finite, as `finding` says. Raised on every rank after the same step."""

    def __init__(
        self, finding: str, *, step: int, learning_rate: float, advice: str, samples: Sequence[str] = ()
    ) -> None:
        others = f" and {len(samples) - 3} more in {NONFINITE}" if len(samples) > 3 else ""
        named = f" with the samples {', '.join(samples[:3])}{others}" if samples else ""
        super().__init__(f"{finding}, at a learning rate of {learning_rate:.4g}{named}: {advice}")
        self.step, self.samples = step, tuple(samples)


def ending_of(error: BaseException) -> Ending:
    """Return the ending that an exception means."""
    if isinstance(error, SystemExit) and error.code == 0:  # a signal after the result was written
        return Ending(State.FINISHED)
    if isinstance(error, Stopped):
        return Ending(State.STOPPED, error.signal.name, EXIT_CODES[error.signal])
    if stop_signals.first is not None and not is_failure(error):
        return Ending(State.STOPPED, stop_signals.first.name, EXIT_CODES[stop_signals.first])
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        return Ending(State.STOPPED if code in EXIT_CODES.values() else State.FAILED, "", code)
    return Ending(State.FAILED, one_line(error), exit_code(error))
