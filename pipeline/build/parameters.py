"""The parameters of a run, as its folder records them."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import CSafeLoader, YAMLError, parse  # type: ignore[import-untyped]  # it has no stubs
from yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent  # type: ignore[import-untyped]  # as above

from pipeline.cli.compose import flatten

DIGEST = "# SHA-256 of the lines below: "
# Modules that had another name when older runs recorded it.
MOVED = {"_target_: data.loading.crops.": "_target_: data.augment.crops."}
MAX_DEPTH = 50  # levels of a config; ours have 5


def with_digest(text: str) -> str:
    """Return a config as it is recorded, with a first line by which `load_record` notices changes."""
    return f"{DIGEST}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def load_record(path: Path) -> DictConfig:
    """Read the config of a training, which has values only.

    A reference could read the environment, or repeat a part of the file without end.
    Raises: FileNotFoundError; ValueError for another file.
    """
    try:
        text = path.read_text()
        if text.startswith(DIGEST) and text != with_digest(text.partition("\n")[2]):
            raise ValueError(f"{path} has changed since it was written: remove its first line to use it as it is")
        for old, new in MOVED.items():
            text = text.replace(old, new)
        is_plain = _is_plain(text)
        config = OmegaConf.create(text if is_plain else "")
        values = OmegaConf.to_container(config, resolve=False)
    except (YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    texts = str([value for key, value in values.items() if key != "dataset"] if isinstance(values, dict) else [])
    if not is_plain or "${" in texts:  # a class may be named ${x}
        raise ValueError(f"{path} refers to other values or is nested deeply, as no config of a run does")
    if not isinstance(config, DictConfig) or not {"model", "data"} <= config.keys():
        raise ValueError(f"{path} is not the config of a training")
    return config


def _is_plain(text: str) -> bool:
    """Return whether a YAML has no alias and few levels, for which OmegaConf's loader takes minutes."""
    depth = 0
    for event in parse(text, CSafeLoader):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if isinstance(event, AliasEvent) or depth > MAX_DEPTH:
            return False
    return True


def recorded_parameters(path: Path) -> dict[str, object]:
    """Return every value of a recorded config by dotted key, without the description of its data set.

    Raises: FileNotFoundError; ValueError for another file.
    """
    config = load_record(path)
    config.pop("dataset", None)
    return flatten(config)


def recorded_classes(weights: Path) -> list[str] | None:
    """Return the classes of a file of weights: those that its run, or the JSON beside an export, records, if any.

    Raises: ValueError where the record of the run is damaged.
    """
    run, beside = weights.absolute().parent.parent / "config.yaml", weights.with_suffix(".json")
    content: Any = None
    if weights.absolute().parent.name == "checkpoints" and run.is_file():
        config: Any = OmegaConf.to_container(load_record(run), resolve=False)
        content = config.get("dataset")
    elif weights.suffix == ".safetensors" and beside.is_file():
        with suppress(ValueError):  # of another program
            content = json.loads(beside.read_bytes())
    classes = content.get("classes") if isinstance(content, dict) else None
    return [*map(str, classes)] if isinstance(classes, list) else None
