"""Secrets are recognised by name and in addresses, and nothing else is masked."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.build.settings import RunSettings
from pipeline.cli.compose import compose
from pipeline.cli.errors import one_line_errors
from pipeline.cli.secrets import is_secret, mask_address, mask_secrets
from tests.support.hostile import SECRET

SECRETS = (
    *("token", "tracking.hf_token", "GITHUB_TOKEN", "authToken", "api_key", "apiKey", "aws.access_key", "private-key"),
    *("AWS_SECRET_ACCESS_KEY", "password", "PGPASSWORD", "passwd", "db_pass", "client_secret", "credentials.user"),
    *("AZURE_STORAGE_KEY", "account_key"),
)
OTHERS = ("key", "model.keys", "num_tokens", "token_size", "data.label_field", "bypass", "keyboard", "HOME", "author")
ADDRESSES = {
    "https://me:{}@host/path": "https://me:***@host/path",
    "https://{}@host/path": "https://***@host/path",
    "cannot open 'postgresql://me:{}@db:5432/x', again": "cannot open 'postgresql://me:***@db:5432/x', again",
    "postgresql+psycopg2://me:a@b/c{}@db/x": "postgresql+psycopg2://me:***@db/x",
    "mysql://me:{0}@db and mysql://you:{0}@db": "mysql://me:***@db and mysql://you:***@db",
    "sqlite:///a.db?password={}&mode=ro": "sqlite:///a.db?password=***&mode=ro",
    "Protocol=https;AccountName=me;AccountKey={}": "Protocol=https;AccountName=me;AccountKey=***",
    "tracking.api_key={} is not a number": "tracking.api_key=*** is not a number",
}
PLAIN = (
    "http://127.0.0.1:5000/#/experiments/1/runs/a?workflowType=machine_learning",
    "http://host:5000/a@b", "models:/net@champion",    "sqlite:////tmp/a@b.db", "s3://bucket/a:b", "data.root=a@b:c", "postgresql://me@db/x",
)  # fmt: skip


def test_names_of_secrets() -> None:
    assert [name for name in SECRETS if not is_secret(name)] == []
    assert [name for name in OTHERS if is_secret(name)] == []


def test_addresses_lose_their_passwords_only() -> None:
    for text, masked in ADDRESSES.items():
        assert mask_address(text.format(SECRET)) == masked
    for text in PLAIN:
        assert mask_address(text) == text


def test_nested_values_are_masked() -> None:
    values = {
        "a.token": SECRET,
        "b": [{"password": 12345, "name": "x"}, f"https://me:{SECRET}@host"],
        "c": {"credentials": {"user": "x", "expires": None}},
        "d.secret": None,
        "e": 0.1,
    }
    assert mask_secrets(values) == {
        "a.token": "***",
        "b": [{"password": "***", "name": "x"}, "https://me:***@host"],
        "c": {"credentials": {"user": "***", "expires": None}},
        "d.secret": None,
        "e": 0.1,
    }


def test_a_record_has_no_secret_and_no_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASSWORD", SECRET)
    monkeypatch.setenv("MY_SERVER", f"https://me:{SECRET}@host")
    monkeypatch.setenv("MY_FOLDER", "here")
    words = ["trust=true", "tracking.uri=${oc.env:MY_SERVER}", "tracking.experiment=${oc.env:MY_PASSWORD}"]
    config = compose("train", ["+model=lenet", f"runs={tmp_path}", "data.index=${oc.env:MY_FOLDER}", *words])
    assert config.tracking.experiment == SECRET
    settings = RunSettings(config, num_classes=10, weights_sha256=None)
    assert SECRET not in f"{settings.record} {settings.parameters} {settings.in_fingerprint} {settings.in_name}"
    assert (settings.parameters["tracking.experiment"], settings.parameters["data.index"]) == ("***", "here")
    assert "trust" not in settings.parameters
    assert "trust:" not in settings.record


def test_variables_without_secrets_need_no_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_FOLDER", "here")
    monkeypatch.delenv("MISSING", raising=False)
    config = compose("train", ["+model=lenet", "data.index=${oc.env:MY_FOLDER}", "name=${oc.env:MISSING,mine}"])
    assert (config.data.index, config.name) == ("here", "mine")
    assert compose("train", ["+model=lenet", "name=${oc.env:MISSING,null}"]).name is None


def test_errors_name_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), one_line_errors():
        raise ValueError(f"no answer from https://me:{SECRET}@host")
    assert capsys.readouterr().err == "error: no answer from https://me:***@host\n"
