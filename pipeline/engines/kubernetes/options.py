"""The options of `python -m pipeline.engines.kubernetes`, checked by the rules of Kubernetes."""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pipeline.cli.errors import ConfigError
from pipeline.engines.kubernetes.job import Limits
from pipeline.engines.kubernetes.manifest import RANGES, Settings

DEFAULTS = Settings._field_defaults
QUANTITY = re.compile(r"((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(\w*)")
UNITS = {"": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}  # of Kubernetes, in bytes
UNITS |= {letter: 1000.0**power for power, letter in enumerate("kMGTPE", start=1)}
UNITS |= {f"{letter}i": 1024.0**power for power, letter in enumerate("KMGTPE", start=1)}
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")  # RFC 1123, as Kubernetes takes it for a namespace
DOTTED_NAME = re.compile(rf"{NAME.pattern}(\.{NAME.pattern})*")
NAMES = {"claim": DOTTED_NAME, "secret": DOTTED_NAME, "namespace": NAME}
ADVICE = ": see python -m pipeline.engines.kubernetes --help"


class Parser(argparse.ArgumentParser):
    """argparse with this project's exit code for a user error."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"{message}{ADVICE}")


def build_parser() -> Parser:
    """Return the parser of the words before `--`."""
    parser = Parser(
        prog="python -m pipeline.engines.kubernetes",
        description="Run a verb as a job of Kubernetes, wait for its end and exit with its code.",
        epilog="After -- follows the command: python -m pipeline.train +model=resnet",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--image", required=True, help="image built from the Dockerfile")
    add("--claim", required=True, help="PersistentVolumeClaim of the volume that holds the working directory")
    add("--mount", default="", help="folder at which the volume is mounted, here and in the pods; empty: this folder")
    add("--namespace", default="", help="empty: that of kubectl's context")
    add("--kind", choices=("trainjob", "jobset"), default=DEFAULTS["kind"], help="trainjob needs Kubeflow Trainer")
    add("--nodes", type=int, default=DEFAULTS["nodes"], help="pods")
    add("--gpus", type=int, default=DEFAULTS["gpus"], help="GPUs of a node, 0 for a CPU")
    add("--cpus", type=int, default=DEFAULTS["cpus"], help="CPU cores of a node")
    add("--memory", default=DEFAULTS["memory"], help="memory of a node")
    add("--shared-memory", default=DEFAULTS["shared_memory"], help="size of /dev/shm, a part of the memory")
    add("--user", type=int, default=DEFAULTS["user"], help="id of the user that owns the files of the volume")
    add("--secret", default="", help="Secret whose keys become environment variables, such as MLFLOW_TRACKING_URI")
    add("--restarts", type=int, default=DEFAULTS["restarts"], help="restarts after failures, not after evictions")
    add("--poll-seconds", type=float, default=Limits().poll_seconds, help="time between two polls of the job")
    add(
        "--silent-seconds", type=float, default=Limits().silent_seconds, help="limit for a cluster that does not answer"
    )
    add("--print", action="store_true", help="print the manifest instead of writing and applying it")
    return parser


def read_options(words: Sequence[str], *, folder: Path) -> tuple[argparse.Namespace, Settings]:
    """Return the options before `--` and the settings in them. Raises: ConfigError for values that no job can have."""
    options = build_parser().parse_args(words)
    mount = Path(options.mount or folder)
    if not folder.is_relative_to(mount):
        raise ConfigError(f"--mount={mount} does not hold the working directory {folder}: commands name files in it")
    for name, least in RANGES.items():
        value = getattr(options, name)
        if value < least:
            raise ConfigError(f"--{name}={value} must be at least {least}")
    for name, rule in NAMES.items():
        value, separators = getattr(options, name), "dashes and dots" if rule is DOTTED_NAME else "dashes"
        if value and not rule.fullmatch(value):
            raise ConfigError(f"--{name}={value} must be lower-case letters and digits, with {separators} between")
    for name in ("image", "claim"):
        if not re.fullmatch(r"\S+", getattr(options, name)):
            raise ConfigError(f"--{name}={getattr(options, name)} is empty or has spaces")
    for name in ("poll_seconds", "silent_seconds"):
        if not 0 < vars(options)[name] < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')}={vars(options)[name]} must be a number above 0")
    memory, shared = (_bytes_of(name, vars(options)[name]) for name in ("memory", "shared_memory"))
    if shared > memory:
        raise ConfigError(f"--shared-memory={options.shared_memory} is more than --memory={options.memory}")
    own = {name: getattr(options, name) for name in Settings._fields if name not in ("mount", "folder")}
    return options, Settings(**own, mount=mount, folder=folder)


def _bytes_of(option: str, value: str) -> float:
    """Return the bytes of a quantity of Kubernetes, such as 64Gi or 64G. Raises: ConfigError."""
    found = QUANTITY.fullmatch(value)
    if not found or found[2] not in UNITS or float(found[1]) == 0:
        raise ConfigError(f"--{option.replace('_', '-')}={value} must be a size such as 64Gi")
    return float(found[1]) * UNITS[found[2]]
