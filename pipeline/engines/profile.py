"""Where the steps of a study run: values of `conf/profile/`, checked."""

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.cli.errors import ConfigError, FailureError, nearest, one_line
from pipeline.engines.kubernetes.manifest import Settings
from pipeline.engines.kubernetes.options import ADVICE, read_options

# A command for each that succeeds where the scheduler answers.
SCHEDULERS = {"slurm": ("sinfo", "--noheader"), "kubernetes": ("kubectl", "get", "--raw=/readyz")}
SCHEDULER_SECONDS = 30.0
VERBS = ("pack", "index", "train", "evaluate", "report", "export", "compare")
COUNTS = ("nodes", "tasks", "cpus_per_task", "mem_mb", "runtime", "here")
KUBERNETES = "-m pipeline.engines.kubernetes "
OPTION = re.compile(
    rf"--({'|'.join(Settings._fields).replace('_', '-')})\b"
)  # of that program, by a key of the profile
PLAIN = re.compile(r"[\w./:=,@%+ -]+")  # words, which bash takes as they are


class Profile(NamedTuple):
    """Where steps run: the scheduler, one of SCHEDULERS or None for this machine, and Snakemake's executor.

    Then the number of steps at a time, and by verb the words before `python` and resources.
    """

    scheduler: str | None
    executor: str
    jobs: int
    prefix: Mapping[str, str]
    resources: Mapping[str, Mapping[str, object]]
    arguments: Sequence[str] = ()


def read_profile(values: Mapping[str, Any], *, jobs: object) -> Profile:
    """Return the profile with these values; `jobs` replaces its number of steps, unless it is None.

    Raises: ConfigError for a scheduler that is not known, a program that this machine does not have, and options of
    Kubernetes that no job can have.
    """
    scheduler = values["scheduler"]
    if scheduler not in (None, *SCHEDULERS):
        known = f"{', '.join(SCHEDULERS)}{nearest(str(scheduler), SCHEDULERS)}"
        raise ConfigError(f"profile.scheduler={scheduler} is not one of {known}")
    at_once = values["jobs"] if jobs is None else jobs
    if type(at_once) is not int or at_once < 1:
        raise ConfigError(f"jobs={at_once} must be an integer of at least 1")
    prefix = {verb: words for verb, words in _group_in(values, "prefix").items() if words is not None}
    for verb, words in prefix.items():
        if not isinstance(words, str):
            raise ConfigError(f"profile.prefix.{verb}={words} must be a text")
        prefix[verb] = words.replace("{python}", shlex.quote(sys.executable))
        _check_prefix(prefix[verb], key=f"profile.prefix.{verb}", is_local=values["executor"] == "local")
    resources = {verb: _read_resources(verb, named) for verb, named in _group_in(values, "resources").items()}
    return Profile(scheduler, values["executor"], at_once, prefix, resources, values["arguments"])


def _group_in(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key) or {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"profile.{key}={found} must be a group of keys")
    return found


def _read_resources(verb: str, named: object) -> dict[str, object]:
    """Return the resources of a verb's jobs that are set. Raises: ConfigError."""
    key = f"profile.resources.{verb}"
    if verb not in VERBS:
        raise ConfigError(f"{key}: a study has no steps of {verb}{nearest(verb, VERBS)}")
    if not isinstance(named, Mapping):
        raise ConfigError(f"{key}={named} must be a group of keys")
    found: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    for name, value in found.items():
        if name in COUNTS and (type(value) is not int or value < 1):
            raise ConfigError(f"{key}.{name}={value} must be an integer of at least 1")
        if not isinstance(value, int | float | str):
            raise ConfigError(f"{key}.{name}={value} must be a number or a text")
    if "tasks" in found and found["tasks"] % found.get("nodes", 1):
        raise ConfigError(f"{key}.tasks={found['tasks']} is not a multiple of its nodes={found['nodes']}")
    return found


def _check_prefix(words: str, *, key: str, is_local: bool) -> None:
    parsed = subprocess.run(["bash", "-n", "-c", f"{words} true"], capture_output=True, text=True, check=False)
    if parsed.returncode:
        reason = parsed.stderr.strip().splitlines()[0].rpartition("line 1: ")[2]
        raise ConfigError(f"{key}={words} is no command for bash: {reason}")
    if is_local and PLAIN.fullmatch(words):  # others are code for bash
        program = next((word for word in words.split() if "=" not in word), "true")
        known = subprocess.run(["bash", "-c", 'type "$1"', "type", program], capture_output=True, check=False)
        if known.returncode:
            raise ConfigError(f"{key}={words}: there is no program {program}")
    _, module, options = words.partition(KUBERNETES)
    if module:
        try:
            read_options(shlex.split(options.removesuffix("--")), folder=Path.cwd())
        except ValueError as error:
            text = OPTION.sub(lambda found: f"profile.{found[1].replace('-', '_')}", str(error))
            raise ConfigError(text.removesuffix(ADVICE)) from None


def check_scheduler(scheduler: str | None) -> None:
    """Raise unless this scheduler answers: ConfigError where its program is missing, else FailureError."""
    if scheduler is None:
        return
    words = SCHEDULERS[scheduler]
    try:
        subprocess.run(words, capture_output=True, text=True, timeout=SCHEDULER_SECONDS, check=True)
        return
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"exit code {error.returncode}"
    except FileNotFoundError:
        raise ConfigError(f"{words[0]} is not installed: profile=local runs the steps on this machine") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = one_line(error)
    raise FailureError(f"{scheduler} does not answer: {words[0]}: {reason}")
