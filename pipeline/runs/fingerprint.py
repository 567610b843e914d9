"""What decides the bits of a run: a run resumes only with an equal fingerprint, and its name carries a hash of it."""

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from data.shards.dataset import Dataset

Fingerprint = Mapping[str, object]  # settings, digests and versions by name
LIBRARIES = ("torch", "nvidia-dali-cuda130")


def default_name(network: str, dataset: Dataset, *, settings: Mapping[str, object]) -> str:
    """Return network, data set and a hash of all settings and samples that decide the result."""
    deciding = dict(settings) | _digests(dataset)
    digest = hashlib.sha256(json.dumps(deciding, sort_keys=True, default=str).encode()).hexdigest()
    return f"{network}-{dataset.name}-{digest[:8]}"


def fingerprint(
    settings: Mapping[str, object], dataset: Dataset, *, global_batch_size: int, precision: str
) -> Fingerprint:
    """Return everything that decides what a run computes: equal fingerprints lead to equal bits."""
    resolved = {"global_batch_size": global_batch_size, "precision": precision}
    versions = {library: metadata.version(library) for library in LIBRARIES}
    return dict(settings) | _digests(dataset) | resolved | versions


def check_unchanged(before: Fingerprint, now: Fingerprint, *, run: Path) -> None:
    """Raise ValueError, naming the first difference, unless both fingerprints are equal as JSON."""
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), json.loads(json.dumps(now.get(name)))
        if old != new:
            raise ValueError(
                f"{run} was started with {name}={old}, not {new}: add name=NAME for a new run, "
                "or give the values it was started with"
            )


def _digests(dataset: Dataset) -> dict[str, str]:
    return {f"digest of {name}": split.digest for name, split in dataset.splits.items()}
