"""The manifest of a data set, `dataset.json`: written with a digest of its own content, read and checked.

A person may edit it, for instance class names: without the line `"digest"` the edit is accepted.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from data.shards.dataset import SPLITS, Dataset, Shard, Split, write_atomically
from data.storage.location import Root

FORMAT = 1
MANIFEST = "dataset.json"
SCHEME = re.compile("pipe:|[a-z][a-z0-9+.-]*:/", re.IGNORECASE)  # of a URL; a name may have a colon, as in 12:30.tar
ADVICE = "restore it, or remove it to have the tars indexed again (class names in it are lost)"

# The types of the fields of each JSON object.
DATASET_FIELDS = {"format": int, "name": str, "classes": list, "mean": list, "std": list, "splits": dict}
SPLIT_FIELDS = {"samples": int, "shards": list, "index": str, "digest": str}
CURRENT_SPLIT_FIELDS = SPLIT_FIELDS | {"index_sha256": str, "origin": str}  # older manifests lack these two
SHARD_FIELDS = {"file": str, "samples": int, "bytes": int, "sha256": str}


def write_manifest(dataset: Dataset) -> None:
    """Write the manifest atomically."""
    splits = {name: {"samples": split.samples, **asdict(split)} for name, split in dataset.splits.items()}
    facts = {"name": dataset.name, "classes": dataset.classes, "mean": dataset.mean, "std": dataset.std}
    content = {"format": FORMAT, **facts, "splits": splits}
    # The digest comes first: a person removes the line, and what remains is valid JSON.
    manifest = {"digest": _digest(content), **content}
    write_atomically(dataset.folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n")


def read_manifest(folder: Path, root: Root) -> Dataset:
    """Read the manifest. Raises: ValueError when it has another format, is damaged, or does not fit its digest."""
    path = folder / MANIFEST
    try:
        content: Any = json.loads(path.read_bytes().decode(), parse_constant=_refuse_constant)
        digest = content.pop("digest", None) if isinstance(content, dict) else None
        is_changed = digest is not None and digest != _digest(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not the manifest of a data set ({error}): {ADVICE}") from error
    if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{path} has format {content['format']}, this program reads {FORMAT}: pack the data set again")
    if is_changed:
        keep = 'to keep an edit, remove its line "digest"'
        raise ValueError(f"{path} was edited or is damaged: {keep}; otherwise {ADVICE}")
    try:
        fields = _fields(content, DATASET_FIELDS, place="the file")
        splits = {name: _split(split, place=f"split {name}") for name, split in fields["splits"].items()}
        _require(bool(splits) and splits.keys() <= set(SPLITS), f"its splits are not among {', '.join(SPLITS)}")
        mean, std = (_colour(fields[name], place=name) for name in ("mean", "std"))
        _require(min(std) > 0, "std has a value that is not positive")
        return Dataset(
            root, folder, fields["name"], _classes(fields["classes"]), mean, std, splits, is_edited=digest is None
        )
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path} is not the manifest of a data set ({error}): {ADVICE}") from error


def _digest(content: object) -> str:
    """The SHA-256 of the canonical JSON of everything but the digest."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _split(found: object, *, place: str) -> Split:
    is_old = isinstance(found, dict) and not {"index_sha256", "origin"} & found.keys()
    fields = _fields(found, SPLIT_FIELDS if is_old else CURRENT_SPLIT_FIELDS, place=place)
    shards = tuple(_shard(shard, place=f"a shard of {place}") for shard in fields["shards"])
    _require(bool(shards), f"{place} has no shards")
    _require(fields["samples"] == sum(shard.samples for shard in shards), f"{place} and its shards differ in samples")
    file = _inside(fields["index"], place=place)
    return Split(shards, file, fields["digest"], fields.get("index_sha256", ""), fields.get("origin", ""))


def _shard(found: object, *, place: str) -> Shard:
    fields = _fields(found, SHARD_FIELDS, place=place)
    is_possible = 0 < fields["samples"] <= fields["bytes"] < 2**63
    _require(is_possible, f"{place} cannot have {fields['samples']} samples in {fields['bytes']} bytes")
    return Shard(_inside(fields["file"], place=place), fields["samples"], fields["bytes"], fields["sha256"])


def _fields(found: object, kinds: Mapping[str, type], *, place: str) -> dict[str, Any]:
    """Return the fields of a JSON object. Raises: ValueError unless it has exactly these, of these types."""
    if not isinstance(found, dict):
        raise ValueError(f"{place} is not an object of JSON")
    for name in found:
        _require(name in kinds, f"{place} has an unknown field {json.dumps(name)}")
    for name, kind in kinds.items():
        _require(name in found, f"{place} lacks the field {name}")
        _require(type(found[name]) is kind, f"{name} of {place} is not of type {kind.__name__}")
    return found


def _classes(found: list[object]) -> tuple[str, ...]:
    names = tuple(name for name in found if isinstance(name, str))
    _require(len(names) == len(found) > 0, "classes are not all names")
    _require(len(set(names)) == len(names), "two classes have the same name")
    return names


def _colour(found: list[object], *, place: str) -> tuple[float, float, float]:
    numbers = [float(one) for one in found if isinstance(one, int | float) and not isinstance(one, bool)]
    _require(len(numbers) == len(found) == 3 and all(map(math.isfinite, numbers)), f"{place} is not three numbers")
    red, green, blue = numbers
    return red, green, blue


def _inside(file: str, *, place: str) -> str:
    """Return a path of the manifest. Raises: ValueError when it leads out of the data set's folder."""
    path = PurePosixPath(file)
    leads_out = path.is_absolute() or ".." in path.parts or SCHEME.match(file) or "\0" in file or not path.parts
    _require(not leads_out, f"{place} names {json.dumps(file)}, which is not a file inside the data set's folder")
    return file


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def _require(condition: object, problem: str) -> None:
    if not condition:
        raise ValueError(problem)
