"""The parameters of a run, as its folder records them."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]  # it has no stubs

from pipeline.cli.compose import flatten


def load_record(path: Path) -> DictConfig:
    """Read the config that a run has recorded. Raises: FileNotFoundError; ValueError for another file."""
    try:
        config = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(config, DictConfig) or not {"model", "data"} <= config.keys():
        raise ValueError(f"{path} is not the config of a training")
    return config


def recorded_parameters(path: Path) -> dict[str, object]:
    """Return every value of a recorded config by dotted key, without the description of its data set.

    Raises: FileNotFoundError; ValueError for another file.
    """
    config = load_record(path)
    config.pop("dataset", None)
    return flatten(config)
