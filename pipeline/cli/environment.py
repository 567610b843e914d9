"""Environment variables in configs, `${oc.env:NAME}`: those with secrets need trust, and never enter a record."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from pipeline.cli.errors import ConfigError
from pipeline.cli.secrets import MASK, is_secret, mask_address

# What MLflow sends to whichever server it is given.
CREDENTIALS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_AUTH")
CREDENTIALS_FILE = Path("~/.mlflow/credentials")

_is_recording: ContextVar[bool] = ContextVar("is_recording", default=False)
_NO_DEFAULT = object()


@contextmanager
def without_secrets() -> Iterator[None]:
    """Resolve variables that hold secrets to asterisks inside the block."""
    token = _is_recording.set(True)
    try:
        yield
    finally:
        _is_recording.reset(token)


def guard_environment() -> None:
    """Replace OmegaConf's resolver `oc.env`."""
    OmegaConf.register_new_resolver("oc.env", _read_variable, replace=True)


def is_server(uri: object) -> bool:
    """Return whether an address is that of a server, as MLflow understands it."""
    return str(uri).strip().lower().startswith("http")


def check_server(uri: object) -> None:
    """Refuse the address of a server in a file, if it would be sent the credentials for another one.

    Raises: ConfigError.
    """
    own = os.environ.get("MLFLOW_TRACKING_URI", "")
    has_credentials = any(map(os.environ.get, CREDENTIALS)) or CREDENTIALS_FILE.expanduser().is_file()
    if has_credentials and is_server(uri) and str(uri).rstrip("/") != mask_address(own).rstrip("/"):
        raise ConfigError(
            f"tracking.uri={uri} would be sent your credentials for MLflow: set MLFLOW_TRACKING_URI to it"
        )


def _read_variable(name: str, default: object = _NO_DEFAULT, *, _root_: DictConfig) -> str | None:
    """Return a variable, or the default as text. Raises: ConfigError for a secret without `trust=true`."""
    value = os.environ.get(name)
    if value is None:
        if default is _NO_DEFAULT:
            raise ConfigError(f"the environment has no variable {name}, which the config reads")
        return None if default is None else str(default)
    if not is_secret(name) and mask_address(value) == value:
        return value
    if _is_recording.get():
        return MASK
    if not _root_.get("trust"):
        raise ConfigError(f"the config reads {name} from the environment: add trust=true to the command to allow that")
    return value
