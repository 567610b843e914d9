"""Manifest and indexes of a data set in an object store: fetched when they lie beside its tars."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from data.arguments import ArgumentError
from data.shards.dataset import Dataset, check_index, write_atomically
from data.shards.index_writer import index_origin
from data.shards.manifest import MANIFEST, read_manifest, write_manifest
from data.storage.local import Version
from data.storage.location import Url, join
from data.storage.remote import OPENING_RETRIES, RemoteShards

LABEL_FIELD = "label"  # the default
VERSIONS = "versions.json"  # of the tars, so that what opens a data set need not list them again
Tars = Mapping[str, Mapping[str, Version]]  # of each split by file


def origin_of(tars: Mapping[str, Version], *, label_field: str) -> str:
    """Return the origin of an index of these tars."""
    return index_origin([(file, *version) for file, version in tars.items()], label_field=label_field)


def save_versions(folder: Path, tars: Tars) -> None:
    """Keep the versions of all tars beside the index, for `load_versions`. Raises: OSError."""
    content = json.dumps({split: dict(of) for split, of in tars.items()}).encode()
    path = folder / VERSIONS
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content)


def load_versions(dataset: Dataset, *, label_field: str) -> dict[str, Version] | None:
    """Return the versions of all tars; None where those of this data set have not been kept."""
    try:
        kept = json.loads((dataset.folder / VERSIONS).read_bytes())
        tars = {split: {file: Version(*one) for file, one in of.items()} for split, of in kept.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # not there, or not a file of ours
        return None
    origins = {split: origin_of(of, label_field=label_field) for split, of in tars.items()}
    if origins != {name: split.origin for name, split in dataset.splits.items()}:
        return None
    return {file: version for of in tars.values() for file, version in of.items()}


def list_remote_tars(root: Url) -> dict[str, Version]:
    """Return the tars below a URL, sorted; on a web server, which lists nothing, those of its manifest.

    Raises: ArgumentError for a store that cannot be read.
    """
    shards = RemoteShards(root, retries=OPENING_RETRIES)
    if shards.can_list:
        found = shards.list_tars()
        return {file: found[file] for file in sorted(found) if not _is_hidden(file)}
    try:
        content = shards.read(MANIFEST)
        if content is None:
            problem = f" has no {MANIFEST}, and a web server lists no tars: upload the data set that pack has written"
            raise ArgumentError(("root", root), problem)
        with tempfile.TemporaryDirectory() as folder:
            dataset = _read_manifest(root, Path(folder), content=content)
        return shards.versions(sorted(dataset.shard_bytes))
    except OSError as error:
        raise ArgumentError(("root", root), f" cannot be opened: {error}") from error


def fetch_index(root: Url, folder: Path, *, tars: Tars, label_field: str) -> bool:
    """Copy manifest and indexes from a URL into `folder`; return False where there are none, or of other tars.

    A manifest does not say from which field its labels are, so one for another than the default is not used.
    Raises: ValueError when they are damaged; OSError.
    """
    shards = RemoteShards(root, retries=OPENING_RETRIES)
    content = shards.read(MANIFEST) if label_field == LABEL_FIELD else None
    if content is None:
        return False
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetched-") as name:
        fetched = _read_manifest(root, Path(name), content=content)
        sizes = {split: {file: version.size for file, version in of.items()} for split, of in tars.items()}
        listed = {name: {shard.file: shard.bytes for shard in split.shards} for name, split in fetched.splits.items()}
        if listed != sizes or not all(split.index_sha256 for split in fetched.splits.values()):
            return False
        for split in fetched.splits.values():
            index = shards.read(split.index)
            if index is None:
                raise FileNotFoundError(f"{join(root, split.index)} does not exist: upload it beside {MANIFEST}")
            path = Path(name, Path(split.index).name)
            path.write_bytes(index)
            check_index(path, split)
            path.rename(folder / path.name)
    splits = {
        name: replace(split, index=Path(split.index).name, origin=origin_of(tars[name], label_field=label_field))
        for name, split in fetched.splits.items()
    }
    write_manifest(replace(fetched, folder=folder, splits=splits))
    return True


def _read_manifest(root: Url, folder: Path, *, content: bytes) -> Dataset:
    (folder / MANIFEST).write_bytes(content)
    try:
        return read_manifest(folder, root)
    except ValueError as error:
        raise ValueError(str(error).replace(str(folder / MANIFEST), join(root, MANIFEST))) from error


def _is_hidden(file: str) -> bool:
    return any(part.startswith(".") for part in file.split("/"))
