"""From the place of a data set's tars to the storage that reads them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data.arguments import ArgumentError, require
from data.storage.cache import GIGABYTE, CacheFolder, bytes_of
from data.storage.cached import CachedShards
from data.storage.local import LocalShards, Storage, Version
from data.storage.location import Root, Url
from data.storage.remote import INFLIGHT, RemoteShards

CACHE_GIGABYTES = 100.0


@dataclass(frozen=True)
class StorageSettings:
    """How an object store is read: requests at once, and the folder and bound of a cache, None for none.

    Raises: ArgumentError for numbers that are not positive.
    """

    inflight: int = INFLIGHT
    folder: Path | None = None
    gigabytes: float = CACHE_GIGABYTES

    def __post_init__(self) -> None:
        is_valid = isinstance(self.inflight, int) and self.inflight is not True and self.inflight >= 1
        require(is_valid, "must be an integer of at least 1", inflight=self.inflight)
        bytes_of(self.gigabytes)


def open_storage(
    root: Root,
    sizes: Mapping[str, int],
    *,
    settings: StorageSettings = StorageSettings(),  # frozen
    versions: Mapping[str, Version] | None = None,
) -> Storage:
    """Return the storage of the shards in `root`, whose `sizes` in bytes are those of the index.

    A cache needs their `versions`; without them the store is listed.
    Raises: ArgumentError for a cache smaller than a shard or larger than its disk, or for changed shards; OSError.
    """
    if not isinstance(root, Url):
        return LocalShards(root)
    shards = RemoteShards(root, inflight=settings.inflight)
    if settings.folder is None:
        return shards
    largest, limit = max(sizes, key=sizes.__getitem__), bytes_of(settings.gigabytes)
    if sizes[largest] > limit:
        size = f"{sizes[largest] / GIGABYTE:.3g} GB"
        raise ArgumentError(("gigabytes", settings.gigabytes), f" is less than the shard {largest} has: {size}")
    cache = CacheFolder(settings.folder, limit)
    cache.check_space(sum(sizes.values()))
    versions = versions or shards.versions(sizes)
    changed = next((file for file, version in versions.items() if version.size != sizes[file]), None)
    if changed is not None:
        raise ArgumentError(("root", root), f": {changed} has just changed: start again to index it")
    return CachedShards(shards, cache, versions=versions)
