"""What users of an object store can get wrong, each answered in one sentence before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from omegaconf import DictConfig

from data.shards.dataset import Dataset
from data.shards.indexing import open_dataset
from data.storage.location import Url
from pipeline.cli.errors import exit_code
from pipeline.cli.verb import Verb
from pipeline.index import VERB as INDEX_VERB
from pipeline.index import main as index
from pipeline.pack import VERB as PACK_VERB
from pipeline.pack import main as pack
from pipeline.train.__main__ import VERB as TRAIN_VERB
from pipeline.train.__main__ import main as train
from tests.support.commands import Run, call_verb
from tests.support.stores import KEYS, S3, free_port

TRAIN = ("+model=lenet", "data=shards", "data.index=index", "tracking=none")


def refused(verb: Verb, main: Callable[[DictConfig], None], *words: str) -> str:
    """Run a verb that must refuse its words; return the sentence."""
    with pytest.raises(ValueError, match=r"^\S+=") as error:
        call_verb(verb, main, list(words))
    assert exit_code(error.value) == 1
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in str(error.value)
    return str(error.value)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def strict_s3(s3: S3) -> Iterator[S3]:
    """moto's S3 while it checks signatures."""
    s3.check_signatures(True)
    yield s3
    s3.check_signatures(False)


def test_a_bucket_that_does_not_exist(s3: S3, run_verb: Run, tmp_path: Path) -> None:
    answer = run_verb("train", *TRAIN, "data.root=s3://nowhere/data")
    sentence = "is in a bucket that does not exist, or that this account cannot see"
    assert answer.stderr == f"error: data.root=s3://nowhere/data {sentence}\n"
    assert (answer.returncode, answer.stdout) == (1, "")
    assert not (tmp_path / "runs").exists()


def test_a_study_of_a_bucket_that_does_not_exist_starts_nothing(s3: S3, run_verb: Run, tmp_path: Path) -> None:
    words = ("+study=digits", "~study.data.digits.pack", "+study.data.digits.root=s3://nowhere/data")
    answer = run_verb("workflow", *words)
    sentence = answer.stderr.splitlines()[-1]  # after the progress, where that takes seconds
    assert sentence.startswith("error: index/digits: root=s3://nowhere/data is in a bucket that does not exist")
    assert (answer.returncode, answer.stdout) == (1, "")
    assert not (tmp_path / "studies").exists()


def test_a_folder_without_tars(s3: S3, bucket: str, tmp_path: Path) -> None:
    s3.client.create_bucket(Bucket=bucket)
    answer = f"^root=s3://{bucket}/data is not a data set: it contains neither dataset.json nor a .tar file$"
    with pytest.raises(ValueError, match=answer):
        open_dataset(Url(f"s3://{bucket}/data"), tmp_path)


def test_a_wrong_credential(remote: str, strict_s3: S3, tmp_path: Path) -> None:
    answer = r"may not be read \(InvalidAccessKeyId\): check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    with pytest.raises(ValueError, match=f"^root={remote} {answer}") as error:
        open_dataset(Url(remote), tmp_path)
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in str(error.value)


def test_no_credential(remote: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(
        ValueError, match=f"^root={remote} needs credentials, and there are none: set AWS_ACCESS_KEY_ID"
    ):
        open_dataset(Url(remote), tmp_path)


def test_an_endpoint_that_nobody_listens_on(s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    answer = "^root=s3://some-bucket/data cannot be reached: check the network, and AWS_ENDPOINT_URL$"
    with pytest.raises(ValueError, match=answer):
        open_dataset(Url("s3://some-bucket/data"), tmp_path)


def test_http_without_permission(s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(ValueError, match=r"over http, which AWS_ALLOW_HTTP=true allows: check AWS_ENDPOINT_URL$"):
        open_dataset(Url("s3://some-bucket/data"), tmp_path)


def test_azure_without_an_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(ValueError, match=r"^root=az://box/data needs credentials, and there are none: set AZURE_"):
        open_dataset(Url("az://box/data"), tmp_path)


def test_a_url_where_a_folder_is_needed(remote: str) -> None:
    sentence = refused(TRAIN_VERB, train, *TRAIN[:2], f"data.root={remote}", "tracking=none")
    assert sentence == f"data.root={remote} is a URL: data.index=FOLDER keeps manifest and index here"
    for words, key in (
        (("data.index=s3://b/c",), "data.index"),
        (("data.index=i", "data.cache=s3://b/c"), "data.cache"),
    ):
        found = refused(TRAIN_VERB, train, *TRAIN[:2], f"data.root={remote}", *words, "tracking=none")
        assert found == f"{key}=s3://b/c is a URL: give a folder on this machine"
    found = refused(TRAIN_VERB, train, "+model=lenet", f"data.root={remote}", "data=digits", "tracking=none")
    assert found == f"data.source=digits is packed into a folder, and data.root={remote} is a URL: add ~data.source"
    sentence = "out=s3://bucket/new is a URL: give a folder on this machine"
    assert refused(PACK_VERB, pack, "out=s3://bucket/new") == sentence
    assert refused(INDEX_VERB, index, f"root={remote}", "out=s3://bucket/new") == sentence


def test_a_cache_that_cannot_be(remote: str, tmp_path: Path, photographs: Dataset) -> None:
    words = (*TRAIN, f"data.root={remote}")
    largest = max(photographs.shard_bytes, key=photographs.shard_bytes.__getitem__)
    size = photographs.shard_bytes[largest] / 1e9
    sentence = refused(TRAIN_VERB, train, *words, "data.cache=cache", "data.cache_gb=0.0001")
    assert sentence == f"data.cache_gb=0.0001 is less than the shard {largest} has: {size:.3g} GB"
    (tmp_path / "file").touch()
    assert refused(TRAIN_VERB, train, *words, "data.cache=file").startswith("data.cache=file cannot be used: ")
    for key in ("data.cache_gb", "data.inflight"):
        assert refused(TRAIN_VERB, train, *words, f"{key}=0").startswith(f"{key}=0 must be ")
