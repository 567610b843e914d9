"""A config from a stranger runs nothing and leaks nothing: each value here would leave a marker if it did."""

from __future__ import annotations

import pickle
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline import pack
from pipeline.build.objects import build_object
from pipeline.cli.compose import compose
from pipeline.train import __main__ as train
from tests.support.commands import Run
from tests.support.hostile import COMMAND, MARKER, SECRET, Bomb, answer_of, assert_refused, copy_conf, texts_below

# Nodes that run something when they are built, as `test_with_trust_the_same_node_runs` shows.
NODES = [
    f"{{_target_: os.system, command: {COMMAND}}}",
    f"{{_target_: subprocess.getoutput, cmd: {COMMAND}}}",
    f"{{_target_: torch.utils.collect_env.run, command: {COMMAND}}}",
    "{_target_: torch.hub.load, repo_or_dir: ., source: local, model: any}",
    "{_target_: torch.load, f: bomb.pt, weights_only: false}",
    "{_target_: numpy.load, file: bomb.pt, allow_pickle: true}",
    "{_target_: pandas.read_pickle, filepath_or_buffer: bomb.pt}",
    "{_target_: joblib.load, filename: bomb.pt}",
    "{_target_: runpy.run_path, path_name: hubconf.py}",
    "{_target_: hubconf.anything}",
    f"{{_target_: webdataset.gopen.gopen, url: 'pipe:{COMMAND}'}}",
    f"{{_target_: pipeline.cli.run.os.system, command: {COMMAND}}}",
    f"{{_target_: data.loading.probe.subprocess.getoutput, cmd: {COMMAND}}}",
    "{_target_: models.weights.files.torch.load, f: bomb.pt, weights_only: false}",
]
CALL = NODES[0]
# Values of a command line, and a part of the sentence that refuses them.
TYPED = [
    *((f"model.dropout={node}", " is outside models, torchvision.models, torch.nn: add trust=true") for node in NODES),
    *((f"+trainer.plugins=[{node}]", " is outside pytorch_lightning.strategies, ") for node in NODES[:4]),
    ("model._target_=builtins.eval", "builtins.eval is outside models"),
    ("model._target_=torch.nn.functional.relu", "torch.nn.functional.relu is outside models"),
    ("model._target_=models.weights.files.read", "not a class of Module defined in"),
    ("model._target_=models.layers.nn", "model._target_=models.layers.nn is not a class of Module defined in"),
    ("model._target_=models.residual.ConvNet", "ConvNet is not a class of Module defined in models.residual"),
    ("model._target_=models.residual.resnett", "does not exist: module 'models.residual' has no attribute 'resnett'"),
    ("model._target_=torchvision.models.resnet18 | +model.weights=DEFAULT", "would download and unpickle"),
    ("+model._args_=[1]", "model._args_=[1] is not supported"),
    ("+model._convert_=object", "model._convert_=object is not supported"),
    ("+model._mode_=object", "model._mode_=object is not supported"),
    ("+model._partial_=2", "model._partial_=2 is not supported"),
    ("recipe.loss._target_=os.system", "os.system is outside models, torch.nn, torch.nn.functional"),
    ("recipe.optimizer._target_=functools.partial", "functools.partial is outside models, torch.optim"),
    ("recipe.schedule._target_=models.learning.recipe.partial", "partial is not a class of float defined in"),
    ("augment.training._target_=data.loading.loader.Loader", "not a class of CropPolicy defined in"),
    ("data._target_=data.shards.dataset.write_atomically", "write_atomically is outside pipeline.build.data"),
    ("tracking._target_=pipeline.tracking.mlflow_tracker.Page", "Page is not a class of Tracker defined in"),
    ("trainer._target_=pytorch_lightning.LightningModule", "is not a class of Trainer defined in"),
    (f"name={CALL}", "name._target_=os.system is at a key that builds nothing"),
    ("data.source=../../../source | data.root=new", "data.source=../../../source is not one of digits, folder"),
    (f"data.root='pipe:{COMMAND}' | data=shards", f"data.root=pipe:{COMMAND} is not a folder"),
    (f"weights='pipe:{COMMAND}'", f"weights=pipe:{COMMAND}: there is no such file"),
    ("+hydra.callbacks.mine={_target_: os.system}", "hydra.callbacks.mine._target_=os.system may run code"),
    ("--hydra-help | +hydra.callbacks.x={_target_: os.system}", "hydra.callbacks.x._target_=os.system may run code"),
    ("hydra.launcher._target_=os.system | -m", "hydra.launcher._target_=os.system may run code"),
    (f"+hydra.launcher.setup=['{COMMAND}'] | -m", f"hydra.launcher.setup=['{COMMAND}'] may run code"),
    ("hydra.sweeper._target_=os.system,os.popen | -m", "hydra.sweeper._target_=os.system may run code"),
    ("+hydra.job_logging.handlers.x={class: os.system}", "hydra.job_logging.handlers.x.class=os.system may run"),
    ("+hydra.hydra_logging.handlers.x={class: os.system}", "hydra.hydra_logging.handlers.x.class=os.system may run"),
    ("hydra/job_logging=default", "hydra.job_logging."),
    ("+hydra.job.env_set.LD_PRELOAD=./ran.so", "hydra.job.env_set.LD_PRELOAD=./ran.so may run code"),
    ("hydra.searchpath=[file:///tmp]", "hydra.searchpath=['file:///tmp'] may run code"),
    ("name=${oc.env:MY_PASSWORD}", "the config reads MY_PASSWORD from the environment: add trust=true"),
    ("tracking.uri='http://localhost:9/${oc.env:MY_PASSWORD}'", "the config reads MY_PASSWORD from the environment"),
    (f"tracking.uri='postgresql://me:{SECRET}@db/x' | -m", "tracking.uri has a secret, which a sweep would write"),
]
# Experiments in YAML, each with `+experiment=theirs`.
WRITTEN = [
    (f"model: {CALL}", "model._target_=os.system is outside"),
    (f"evil: os.system\nmodel: {{_target_: '${{evil}}', command: {COMMAND}}}", "model._target_=${evil} is outside"),
    (f"evil: {CALL}\nmodel: ${{evil}}", "evil._target_=os.system is at a key that builds nothing"),
    (f"""model: '${{oc.create:"{CALL}"}}'""", "model._target_=os.system is outside"),
    (f"""model: '${{oc.decode:"{CALL}"}}'""", "is no group of keys"),
    (f"""model: {{dropout: '${{oc.decode:"{CALL}"}}'}}""", "model.dropout._target_=os.system is outside"),
    (f"""model: {{dropout: ['${{oc.create:"{CALL}"}}']}}""", "model.dropout.0._target_=os.system is outside"),
    (
        f"callbacks: {{x: {CALL}}}",
        "callbacks.x._target_=os.system is outside models, pipeline.train.callbacks, pytorch_",
    ),
    (
        f"callbacks: {{x: {{_target_: pytorch_lightning.callbacks.LambdaCallback, on_fit_start: {CALL}}}}}",
        "callbacks.x.on_fit_start._target_=os.system is outside",
    ),
    (f"callbacks: {{x: [{CALL}]}}", "callbacks.x.0._target_=os.system is outside"),
    (f"callbacks: {{x: !!python/object/apply:os.system ['{COMMAND}']}}", "could not determine a constructor"),
    ("data: {root: !!python/object/apply:pathlib.Path [nowhere], source: null}", "data.root=nowhere is not a folder"),
    (f"trust: true\nmodel: {CALL}", "trust=True in a YAML does not count"),
    ("hydra: {callbacks: {x: {_target_: os.system}}}", "hydra.callbacks.x._target_=os.system may run code"),
    ("evil: {x: {_target_: os.system}}\nhydra: {callbacks: '${evil}'}", "hydra.callbacks=${evil} may run code"),
    ("hydra: {launcher: {_target_: os.system}}", "hydra.launcher._target_=os.system may run code"),
    ("hydra: {job: {env_set: {LD_PRELOAD: ./ran.so}}}", "hydra.job.env_set.LD_PRELOAD=./ran.so may run code"),
    ("hydra: {job_logging: {handlers: {x: {(): os.system}}}}", "hydra.job_logging.handlers.x.()=os.system may run"),
    ("hydra: {sweeper: {params: {trust: 'true'}}}", "hydra.sweeper.params={'trust': 'true'} may run code"),
    ("hydra: {mode: MULTIRUN}", "hydra.mode=RunMode.MULTIRUN may run code"),
    ("name: ${oc.env:MY_PASSWORD}", "the config reads MY_PASSWORD from the environment: add trust=true"),
    ("variable: MY_PASSWORD\nname: '${oc.env:${variable}}'", "the config reads MY_PASSWORD from the environment"),
    ("tracking: {uri: 'http://stranger'}", "tracking.uri=http://stranger would be sent your credentials for MLflow"),
]


@pytest.fixture
def stranger(with_digits: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with digits, files that run when they are unpickled, and a secret in the environment."""
    monkeypatch.chdir(with_digits)
    monkeypatch.setenv("MY_PASSWORD", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    monkeypatch.syspath_prepend(with_digits)
    monkeypatch.delitem(sys.modules, "hubconf", raising=False)
    (with_digits / "bomb.pt").write_bytes(pickle.dumps(Bomb()))
    (with_digits / "hubconf.py").write_text(f"import os\nos.system('{COMMAND}')\n")
    return with_digits


def test_enough_is_tried() -> None:
    assert len(TYPED) >= 40
    assert len(WRITTEN) >= 15


@pytest.mark.parametrize(("words", "answer"), TYPED, ids=[words for words, _ in TYPED])
def test_a_typed_value_runs_nothing(
    words: str, answer: str, stranger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["+model=lenet", *words.split(" | ")]
    sentence = assert_refused(lambda: answer_of(train.VERB, train.main, given), capsys, folder=stranger)
    assert answer in sentence
    assert not (stranger / "runs").exists()


@pytest.mark.parametrize(("text", "answer"), WRITTEN, ids=[text for text, _ in WRITTEN])
def test_an_experiment_runs_nothing(
    text: str, answer: str, stranger: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = copy_conf(stranger, monkeypatch)
    (conf / "experiment" / "theirs.yaml").write_text(f"# @package _global_\n{text}\n")
    model = [] if "\nmodel:" in f"\n{text}" else ["+model=lenet"]
    words = [*model, "+experiment=theirs"]
    sentence = assert_refused(lambda: answer_of(train.VERB, train.main, words), capsys, folder=stranger)
    assert answer in sentence
    assert not (stranger / "runs").exists()


def test_the_last_choice_of_a_sweep_is_checked_too(
    stranger: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = copy_conf(stranger, monkeypatch)
    (conf / "experiment" / "theirs.yaml").write_text("# @package _global_\nhydra: {job: {env_set: {A: b}}}\n")
    words = ["+model=lenet,resnet", "+experiment=cifar10_resnet18,theirs", "-m"]
    sentence = assert_refused(lambda: answer_of(train.VERB, train.main, words), capsys, folder=stranger)
    assert "hydra.job.env_set.A=b may run code" in sentence


def test_a_source_of_images_runs_nothing(stranger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, answer in (
        (
            ["source._target_=os.system", f"+source.command='{COMMAND}'"],
            "source._target_=os.system is outside data.shar",
        ),
        (["source._target_=data.shards.dataset.write_atomically"], "is not a class of Source defined in"),
        (["source=folder", f"source.root='pipe:{COMMAND}'", "name=x"], f"source.root=pipe:{COMMAND} is not a folder"),
        (["name='../x'"], "name=../x is a path"),
    ):
        sentence = assert_refused(lambda given=words: answer_of(pack.VERB, pack.main, given), capsys, folder=stranger)
        assert answer in sentence
    answer_of(pack.VERB, pack.main, [f"out='pipe:{COMMAND}'"])  # a folder of this name
    assert not (stranger / MARKER).exists()


@pytest.mark.parametrize("node", NODES)
def test_with_trust_the_same_node_runs(node: str, stranger: Path) -> None:
    config = compose("train", ["+model=lenet", f"model.dropout={node}", "trust=true"])
    with suppress(Exception):  # most results are no dropout
        build_object(config, "model", kind=object)
    assert (stranger / MARKER).exists()


def test_a_process_runs_nothing(run_verb: Run, tmp_path: Path) -> None:
    for words in (
        ["+hydra.callbacks.mine={_target_: os.system}"],
        ["+hydra.job_logging.handlers.x={class: os.system}"],
        [f"model.dropout={NODES[2]}"],
    ):
        answer = run_verb("train", "+model=lenet", *words)
        assert (answer.returncode, answer.stdout) == (1, "")
        assert answer.stderr.startswith("error: ")
        assert answer.stderr.count("\n") == 1
        assert list(tmp_path.iterdir()) == []


def test_a_secret_stays_out_of_everything_that_a_training_writes(
    stranger: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = copy_conf(stranger.parent / "elsewhere", monkeypatch)
    callback = "{_target_: tests.support.hostile.Notify, api_key: '${oc.env:MY_PASSWORD}'}"
    (conf / "callbacks" / "theirs.yaml").write_text(f"x: {callback}\n")
    short = ["recipe.epochs=1", "+trainer.limit_train_batches=1", "+trainer.limit_val_batches=1", "name=mine"]
    answer_of(train.VERB, train.main, ["+model=lenet", "callbacks=theirs", "trust=true", *short])
    printed = capsys.readouterr()
    texts = texts_below(stranger / "runs") + texts_below(stranger / "mlartifacts") + printed.out + printed.err
    assert "val/top1" in texts
    assert "api_key: '***'" in texts
    database = (stranger / "mlflow.db").read_bytes()
    assert b"callbacks.x.api_key" in database
    assert SECRET.encode() not in database
    assert SECRET not in texts
