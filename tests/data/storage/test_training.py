"""Trainings and other verbs on a data set in an object store, as they are typed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from data.shards.dataset import Dataset
from pipeline.evaluate.__main__ import VERB as EVALUATE
from pipeline.evaluate.__main__ import main as evaluate
from pipeline.train.__main__ import VERB as TRAIN
from pipeline.train.__main__ import main as train
from tests.support.commands import call_verb, journal, run_module
from tests.support.stores import nginx

WORDS = ("+model=lenet", "data=shards", "data.image_size=32", "data.batch_size=4", "data.shuffle_window=8",
         "recipe.epochs=2", "log_every=1", "tracking=none")  # fmt: skip


def weights_of(run: Path) -> str:
    """Return the SHA-256 of the best checkpoint."""
    (checkpoint,) = run.glob("checkpoints/best.ckpt")
    return hashlib.sha256(checkpoint.read_bytes()).hexdigest()


@pytest.mark.engines
def test_a_training_from_nginx_has_the_bits_of_a_local_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photographs: Dataset
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photographs.root, "local")
    with nginx(tmp_path / "local", tmp_path) as url:
        for name, words in {"local": ("data.root=local",), "served": (f"data.root={url}", "data.index=index")}.items():
            call_verb(TRAIN, train, [*WORDS, *words, f"name={name}"])
    assert len({weights_of(tmp_path / "runs" / name) for name in ("local", "served")}) == 1


@pytest.mark.engines
def test_two_ranks_share_a_cache_and_one_list_of_the_tars(tmp_path: Path, photographs: Dataset) -> None:
    shutil.copytree(photographs.root, tmp_path / "local")
    launch = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pipeline.train", *WORDS)
    with nginx(tmp_path / "local", tmp_path) as url:
        for name, words in {
            "local": ("data.root=local",),
            "cached": (f"data.root={url}", "data.index=index", "data.cache=cache", "data.cache_gb=0.01"),
        }.items():
            answer = run_module(
                tmp_path, *launch, *words, f"name={name}", "trainer.accelerator=cpu", "trainer.devices=2"
            )
            assert answer.returncode == 0, answer.stderr
    assert len({weights_of(tmp_path / "runs" / name) for name in ("local", "cached")}) == 1
    asked = Counter(re.findall(r'"(GET|HEAD) /([^ ]*\.tar) ', (tmp_path / "access.log").read_text()))
    assert {file for method, file in asked if method == "GET"} == photographs.shard_bytes.keys()
    listed = {file: number for (method, file), number in asked.items() if method == "HEAD"}
    assert listed == dict.fromkeys(photographs.shard_bytes, 1)


def test_a_training_from_s3_has_the_bits_of_a_local_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: str, photographs: Dataset
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photographs.root, "local")
    places = {
        "local": ("data.root=local",),
        "remote": (f"data.root={remote}", "data.index=index"),
        "cached": (f"data.root={remote}", "data.index=index", "data.cache=cache", "data.cache_gb=0.01"),
    }
    for name, words in places.items():
        call_verb(TRAIN, train, [*WORDS, *words, f"name={name}"])
    runs = {name: tmp_path / "runs" / name for name in places}
    journals = [journal(run) for run in runs.values()]
    assert len(journals[0]) > 4
    assert all(one == journals[0] for one in journals)
    assert len({weights_of(run) for run in runs.values()}) == 1
    prints = [json.loads((run / "fingerprint.json").read_text()) for run in runs.values()]
    assert all(one == prints[0] for one in prints)
    before = (runs["local"] / "result.json").read_bytes()
    call_verb(TRAIN, train, [*WORDS, *places["remote"], "name=local"])  # the same run, which is finished
    assert (runs["local"] / "result.json").read_bytes() == before
    cached = [path.stat().st_size for path in Path("cache").glob("*.shard")]
    assert sum(cached) == sum(photographs.shard_bytes.values())
    with pytest.raises(ValueError, match=f"^data={remote} is a URL, which only the runs that were trained on it"):
        call_verb(EVALUATE, evaluate, ["run=cached", f"data={remote}"])
    call_verb(EVALUATE, evaluate, ["run=cached", "mlflow=false"])
    table = json.loads(Path("runs/cached/evaluation/val/evaluation.json").read_text())
    assert table["images"] == photographs.splits["val"].samples
    shutil.rmtree("cache")  # as on another machine
    call_verb(EVALUATE, evaluate, ["run=cached", "mlflow=false", "out=elsewhere"])
    assert json.loads(Path("elsewhere/evaluation.json").read_text())["metrics"] == table["metrics"]
    assert not Path("cache").exists()
