"""Servers of object stores, and a data set in them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.shards.dataset import Dataset
from tests.support.stores import S3, moto

NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def server() -> Iterator[S3]:
    """moto's S3."""
    with moto() as running:
        yield running


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """moto's S3, with an environment that leads to it."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture
def bucket() -> str:
    """The name of a new bucket."""
    return f"bucket-{next(NUMBERS)}"


@pytest.fixture
def remote(s3: S3, bucket: str, photographs: Dataset) -> str:
    """The URL of the packed photographs in S3."""
    assert isinstance(photographs.root, Path)
    return s3.upload(photographs.root, bucket)
