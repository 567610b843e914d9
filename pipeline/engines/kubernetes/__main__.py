"""Run a verb as a job of Kubernetes: `python -m pipeline.engines.kubernetes OPTIONS -- COMMAND`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import yaml  # type: ignore[import-untyped]  # it has no stubs

from data.shards.dataset import write_atomically
from pipeline.cli.errors import ConfigError, one_line_errors
from pipeline.cli.signals import stop_signals
from pipeline.engines.kubernetes.job import Limits, run
from pipeline.engines.kubernetes.kubectl import Kubectl
from pipeline.engines.kubernetes.manifest import RANGES, Settings, build_manifest

DEFAULTS = Settings._field_defaults
MANIFESTS = Path("manifests")  # of the jobs that were to be applied


class Parser(argparse.ArgumentParser):
    """argparse with this project's exit code for a user error."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"{message}: see python -m pipeline.engines.kubernetes --help")


def build_parser() -> Parser:
    """Return the options before `--`."""
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


def build_settings(options: argparse.Namespace, *, folder: Path) -> Settings:
    """Return the settings. Raises: ConfigError for a number out of its range and a volume that has not `folder`."""
    mount = Path(options.mount or folder)
    if not folder.is_relative_to(mount):
        raise ConfigError(f"--mount={mount} does not hold the working directory {folder}: commands name files in it")
    for name, least in RANGES.items():
        value = getattr(options, name)
        if value < least:
            raise ConfigError(f"--{name}={value} must be at least {least}")
    own = {name: getattr(options, name) for name in Settings._fields if name not in ("mount", "folder")}
    return Settings(**own, mount=mount, folder=folder)


def verb_in(command: Sequence[str]) -> list[str]:
    """Return module and overrides of `python -m pipeline.VERB`: pods have their own Python. Raises: ConfigError."""
    if len(command) < 3 or command[1] != "-m" or not command[2].startswith("pipeline."):
        raise ConfigError(f"after -- must follow python -m pipeline.VERB, not {' '.join(command) or 'nothing'}")
    return list(command[2:])


def main() -> None:
    """Print the manifest, or write it, run the job and exit with the code of its command."""
    words = sys.argv[1:]
    place = words.index("--") if "--" in words else len(words)
    options = build_parser().parse_args(words[:place])
    settings = build_settings(options, folder=Path.cwd())
    manifest = build_manifest(settings, verb_in(words[place + 1 :]))
    text = yaml.safe_dump(manifest.content, sort_keys=False)
    if options.print:
        print(text, end="")
        return
    stop_signals.install()
    file = MANIFESTS / f"{manifest.name}.yaml"
    MANIFESTS.mkdir(exist_ok=True)
    write_atomically(file, text.encode())
    print(f"wrote {file}", flush=True)
    limits = Limits(options.poll_seconds, options.silent_seconds)
    raise SystemExit(run(manifest, Kubectl(options.namespace), limits=limits))


if __name__ == "__main__":
    with one_line_errors():
        main()
