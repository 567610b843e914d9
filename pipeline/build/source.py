"""From `conf/source` or a folder of tars to a data set; imports no Lightning, for which `pack` would wait."""

from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from data.locks import file_lock
from data.shards.dataset import Dataset
from data.shards.indexing import LOCK_SECONDS, NotADatasetError, open_dataset
from data.shards.pack import Packed, PackSettings, merge_parts, pack, pack_part
from data.shards.parallel import parse_part
from data.shards.sources import Source
from data.storage.location import Root, Url, local_folder
from pipeline.build.objects import build_object
from pipeline.cli.compose import choices, compose
from pipeline.cli.console import print_line, print_skipped
from pipeline.cli.errors import ConfigError, config_keys_in_errors, nearest


def pack_source(config: DictConfig) -> Packed | int:
    """Pack the source of a `pack` config, or only its part: then return its number of shards.

    Raises: FileExistsError, ValueError.
    """
    part = None if config.part is None else parse_part(str(config.part))
    source = build_object(
        config, "source", kind=Source, name=config.name, val_fraction=config.val_fraction, seed=config.seed
    )
    settings = PackSettings(config.seed, config.shard_samples, config.resize, config.strict)
    folder = local_folder(str(config.out), out=config.out)
    if part is not None:
        return pack_part(source, folder, part=part, settings=settings)
    complete = pack if config.part is None else merge_parts
    return complete(source, folder, settings=settings)


def pack_once(source: str, root: Path) -> None:
    """Pack `conf/source/<source>.yaml` into `root` unless the folder exists; one process at a time.

    Raises: ConfigError for another source.
    """
    known = choices("source")
    if source not in known:
        raise ConfigError(f"data.source={source} is not one of {', '.join(known)}{nearest(source, known)}")
    root.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(root.with_name(f".{root.name}.lock"), seconds=LOCK_SECONDS):
        if not root.exists():
            print_line(Console(), f"packing {source} into {root}")
            pack_source(compose("pack", [f"source={source}", f"out={root}"]))


def open_tars(root: Root, folder: Path | None, *, label_field: str, keys: Mapping[str, str]) -> Dataset:
    """Open a data set, and report the samples that indexing has just skipped; `keys` are those of the arguments.

    Raises: ValueError.
    """
    try:
        with config_keys_in_errors(keys):
            dataset, skipped = open_dataset(root, folder, label_field=label_field)
    except NotADatasetError as error:
        if isinstance(root, Url):
            raise
        command = f"python -m pipeline.pack source=folder source.root={root} name=NAME"
        raise ValueError(f"{error} (to pack class folders: {command})") from error
    print_skipped(Console(), skipped)
    if any(sample.lacks_label_field for sample in skipped):
        text = f"{keys['label_field']}=NAME reads labels from another field of .json files"
        print_line(Console(), text)
    return dataset
