"""Run a verb as a job of Kubernetes: `python -m pipeline.engines.kubernetes OPTIONS -- COMMAND`."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml  # type: ignore[import-untyped]  # it has no stubs

from data.shards.dataset import write_atomically
from pipeline.cli.compose import verbs
from pipeline.cli.errors import ConfigError, one_line_errors
from pipeline.cli.signals import stop_signals
from pipeline.engines.commands import check_command, find_verb
from pipeline.engines.kubernetes.job import Limits, run
from pipeline.engines.kubernetes.kubectl import Kubectl
from pipeline.engines.kubernetes.manifest import build_manifest
from pipeline.engines.kubernetes.options import read_options

MANIFESTS = Path("manifests")  # of the jobs that were to be applied


def verb_in(command: Sequence[str]) -> list[str]:
    """Return module and overrides of `python -m pipeline.VERB`: pods have their own Python. Raises: ConfigError."""
    if len(command) < 3 or command[1] != "-m" or command[2] not in {f"pipeline.{verb}" for verb in verbs()}:
        raise ConfigError(f"after -- must follow python -m pipeline.VERB, not {' '.join(command) or 'nothing'}")
    return list(command[2:])


def main() -> None:
    """Print the manifest, or write it, run the job and exit with the code of its command."""
    words = sys.argv[1:]
    place = words.index("--") if "--" in words else len(words)
    if "--" not in words and not {"-h", "--help"} & {*words}:
        raise ConfigError(
            "-- is missing before the command, as in --image=IMAGE --claim=CLAIM -- python -m pipeline.train"
        )
    options, settings = read_options(words[:place], folder=Path.cwd())
    module, *overrides = verb_in(words[place + 1 :])
    if not any(word.startswith("-") for word in overrides):  # flags of Hydra change what a command does
        check_command(find_verb(module.removeprefix("pipeline.")), overrides)
    manifest = build_manifest(settings, [module, *overrides])
    text = yaml.safe_dump(manifest.content, sort_keys=False)
    if options.print:
        print(text, end="")
        return
    if shutil.which("kubectl") is None:
        raise ConfigError("kubectl is not installed: --print shows the manifest")
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
