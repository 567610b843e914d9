"""The verbs, one file or package each, and the rooms that they share."""

import sys

from pipeline.cli.signals import stop_signals

if sys.argv[0] == "-m":  # `python -m pipeline.VERB` looks for the verb: before imports that take seconds
    stop_signals.install()

import data.loading  # noqa: F401  # loads nvJPEG before Lightning imports torchvision, which brings an older one


def __getattr__(name: str) -> object:
    """Import `load` when it is asked for: it needs torch and DALI, which verbs load after their command line."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline.runs.trained import load_model

    return load_model
