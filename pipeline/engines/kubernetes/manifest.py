"""From a command and the settings of a cluster to a manifest: jobset.yaml and trainjob.yaml with their values."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Literal, NamedTuple

import yaml  # type: ignore[import-untyped]  # it has no stubs

from pipeline.cli.errors import FAILURE, USER_ERROR
from pipeline.cli.signals import EXIT_CODES, SAVE_SECONDS

GRACE_SECONDS = int(SAVE_SECONDS) + 60  # between SIGTERM and SIGKILL: the limit of a step and its save, and some to end
RANGES = {"nodes": 1, "gpus": 0, "cpus": 1, "user": 1, "restarts": 0}  # a setting and its least value
NODE = ("python", "-m", "pipeline.engines.kubernetes.node")

Tree = dict[str, object]
Kind = Literal["trainjob", "jobset"]


class Settings(NamedTuple):
    """Where and with what a command runs.

    `claim` names the PersistentVolumeClaim that is mounted at `mount`, in which `folder`, the working directory, is.
    `gpus`, `cpus` and `memory` are those of a node; `secret` names a Secret whose keys become environment variables.
    """

    image: str
    claim: str
    mount: Path
    folder: Path
    kind: Kind = "trainjob"
    nodes: int = 1
    gpus: int = 1
    cpus: int = 8
    memory: str = "64Gi"
    shared_memory: str = "16Gi"  # of /dev/shm, a part of `memory`
    user: int = 1000
    secret: str = ""
    restarts: int = 3


class Manifest(NamedTuple):
    """A job's kind, its name and what `kubectl apply` reads. Equal commands with equal settings have equal names."""

    kind: Kind
    name: str
    content: Tree


def build_manifest(settings: Settings, command: Sequence[str]) -> Manifest:
    """Return the manifest of a verb with its overrides, such as `["pipeline.train", "+model=resnet"]`."""
    unnamed = json.dumps(_fill(settings, command, name="unnamed"), sort_keys=True)
    digest = hashlib.sha256(unnamed.encode()).hexdigest()[:8]
    out = next((word for word in command if word.startswith("out=")), "")
    label = re.sub("[^a-z0-9]+", "-", Path(out).name.lower())[:24].strip("-")
    name = "-".join(word for word in (command[0].rpartition(".")[2], label, digest) if word)
    return Manifest(settings.kind, name, _fill(settings, command, name=name))


def _fill(settings: Settings, command: Sequence[str], *, name: str) -> Tree:
    memory = {"cpu": str(settings.cpus), "memory": settings.memory}
    gpus = {"nvidia.com/gpu": str(settings.gpus)} if settings.gpus else {}
    ranks = max(1, settings.gpus)
    values: Tree = {
        **settings._asdict(),
        "name": name,
        "folder": str(settings.folder),
        "mount": str(settings.mount),
        "command": [*NODE, "-m", *(word.replace("$(", "$$(") for word in command)],  # Kubernetes expands $(NAME)
        "coordinator": f"{name}-node-0-0.{name}",  # JobSet's name of the first pod in its headless service
        "ranks": ranks,
        "ranks_text": str(ranks),
        "nodes_text": str(settings.nodes),
        "resources": {"requests": memory | gpus, "limits": {"memory": settings.memory} | gpus},
        "secrets": [{"secretRef": {"name": settings.secret}}] if settings.secret else [],
        "grace_seconds": GRACE_SECONDS,
        "user_error_codes": [USER_ERROR],
        "failure_codes": [FAILURE],
        "stopped_codes": sorted(set(EXIT_CODES.values())),
    }
    jobset = _read("jobset.yaml", values)
    return jobset if settings.kind == "jobset" else _read("trainjob.yaml", {**values, "jobset": jobset["spec"]})


def _read(file: str, values: Tree) -> Tree:
    text = Path(__file__).with_name(file).read_text()
    _, _, body = text.partition("\n")  # the first line explains the placeholders
    filled = Template(body).substitute({name: json.dumps(value, default=str) for name, value in values.items()})
    found = yaml.safe_load(filled)
    assert isinstance(found, dict)
    return found
