"""From `conf/source` to a packed data set; imports no Lightning, for which `pack` would wait."""

from pathlib import Path

from filelock import FileLock
from omegaconf import DictConfig
from rich.console import Console

from data.shards.indexing import LOCK_SECONDS
from data.shards.pack import Packed, pack
from data.shards.sources import Source
from pipeline.build.objects import build_object
from pipeline.cli.compose import choices, compose
from pipeline.cli.errors import ConfigError, nearest


def pack_source(config: DictConfig) -> Packed:
    """Pack the source of a `pack` config. Raises: FileExistsError, ValueError."""
    if config.name == ".." or Path(str(config.name)).name != str(config.name):
        raise ValueError(f"name={config.name} is a path: out=FOLDER sets the data set's folder")
    source = build_object(
        config, "source", kind=Source, name=config.name, val_fraction=config.val_fraction, seed=config.seed
    )
    options = {name: config[name] for name in ("seed", "shard_samples", "resize", "strict")}
    return pack(source, Path(str(config.out)), **options)


def pack_once(source: str, root: Path) -> None:
    """Pack `conf/source/<source>.yaml` into `root` unless the folder exists; one process at a time.

    Raises: ConfigError for another source.
    """
    known = choices("source")
    if source not in known:
        raise ConfigError(f"data.source={source} is not one of {', '.join(known)}{nearest(source, known)}")
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.with_name(f".{root.name}.lock"), timeout=LOCK_SECONDS):
        if not root.exists():
            Console().print(f"packing {source} into {root}", highlight=False, markup=False)
            pack_source(compose("pack", [f"source={source}", f"out={root}"]))
