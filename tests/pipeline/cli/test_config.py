"""Every mistake on a command line is answered in one sentence; every config composes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pipeline.cli.config import CONF, ConfigError, check_command_line, check_targets, compose, flatten, missing_keys
from tests.conftest import Run

NAMES = ", ".join(sorted(path.stem for path in (CONF / "model").glob("*.yaml")))
GROUPS = sorted(path for path in CONF.glob("*/*.yaml"))


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (
            [],
            f"no model: add +model=NAME, one of {NAMES}",
        ),
        (
            ["+model=resnt"],
            f"model=resnt is not one of {NAMES}: did you mean resnet?",
        ),
        (["model=resnet"], "model=resnet needs a plus: +model=resnet"),
        (["+modle=resnet"], "there is no modle: did you mean model?"),
        (["+model=resnet", "trainer=gpuu"], "did you mean gpu?"),
        (["+model=resnet", "recipe.epoch=3"], "there is no recipe.epoch: did you mean recipe.epochs?"),
        (["+model=resnet", "+optim.lrr=1"], "there is no optim.lrr: did you mean recipe.optimizer.lr?"),
        (["+model=resnet", "recipe.epochs=many"], "recipe.epochs=many is not a whole number (default 8)"),
        (["+model=resnet", "recipe.epochs=1.5"], "is not a whole number"),
        (["+model=resnet", "recipe.epochs=true"], "is not a whole number"),
        (["+model=resnet", "data.batch_size=null"], "is not a whole number"),
        (["+model=resnet", "recipe.optimizer.lr=fast"], "is not a number (default 0.1)"),
        (["+model=resnet", "recipe.optimizer.nesterov=1"], "is not true or false"),
        (["+model=resnet", "augment.training.scale=1"], "is not a list"),
        (["+model=resnet", "data=shards"], "data.root has no default: add data.root=VALUE"),
        (["model.variant=resnet50"], "no model: add +model=NAME"),
        (["+model=resnet", "+recipe.epoch=3"], "there is no recipe.epoch: did you mean recipe.epochs?"),
        (["+model=resnet", "model.num_classes=12"], "+model.num_classes=VALUE hands it to models.residual.resnet"),
        (["+model=resnet", "trainer.limit_val_batches=1"], "+trainer.limit_val_batches=VALUE hands it to pytorch_l"),
        (["+model=resnet", "lr=1"], "there is no lr: did you mean recipe.optimizer.lr?"),
        (["+model=resnet", "data.root=null"], "data.root=null is not a text"),
        (["+model=resnet", "source=folder"], "train has no source to choose, pack has"),
        (
            ["+model=resnet,resnt", "-m"],
            f"model=resnt is not one of {NAMES}: did you mean resnet?",
        ),
        (["+model=resnet", "--lr=0.1"], "there is no flag --lr=0.1: values are set by KEY=VALUE"),
    ],
)
def test_a_mistake_is_answered_with_the_nearest_right_word(words: list[str], answer: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_command_line("train", words)
    assert answer in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        ["+model=resnet"],
        ["+model=resnext", "model.variant=resnext101_64x4d", "recipe.epochs=3", "recipe.clip_norm=1"],
        ["+model=resnet", "+trainer.limit_train_batches=3", "recipe.optimizer.lr=1", "seed=1"],
        ["+model=resnet", "recipe.epochs=1,2", "-m"],
        ["+model=resnet,resnext", "model.image_size=32", "hydra/launcher=basic", "-m"],
        ["+model=resnet", "+trainer.limit_val_batches=3", "trainer.devices=[0]", "data.root=2024", "data=shards"],
        ["+experiment=cifar10_resnet18"],
        ["--cfg", "job", "+model=resnet"],
        ["--help", "+model=resnet", "data=shards"],
        ["+model=resnet", "data.threads=2", "data.threads=null", "data.image_size=${data.batch_size}"],
    ],
)
def test_what_is_right_passes(words: list[str]) -> None:
    assert sorted(check_command_line("train", words)) == sorted(words)


def test_a_file_of_weights_is_typed_short() -> None:
    words = check_command_line("train", ["+model=resnet", "weights=runs/a/best.ckpt", "weights.head=replace"])
    assert words == ["+model=resnet", "weights.file='runs/a/best.ckpt'", "weights.head=replace"]
    for typed, file in (("it's (1).pth", "it's (1).pth"), ("null", None), ("12", "12"), ("'a=b'", "a=b")):
        assert compose("train", check_command_line("train", ["+model=resnet", f"weights={typed}"])).weights.file == file
    (swept,) = check_command_line("train", ["+model=resnet", "weights=a.pth,b.pth", "-m"])[-1:]
    assert swept == "weights.file=a.pth,b.pth"
    with pytest.raises(ConfigError, match=r"there is no weights.heads: did you mean weights.head\?"):
        check_command_line("train", ["+model=resnet", "weights.heads=replace"])


def test_flags_may_stand_anywhere() -> None:
    assert check_command_line("train", ["+model=resnet", "-m", "seed=1"]) == ["-m", "+model=resnet", "seed=1"]
    assert check_command_line("train", ["seed=1", "--cfg", "job", "+model=resnet"])[:2] == ["--cfg", "job"]


def test_a_root_alone_asks_for_the_settings_of_any_data_set() -> None:
    words = ["+model=resnet", "data.root=somewhere"]
    assert check_command_line("train", words) == [*words, "data=shards"]
    assert compose("train", [*words, "data=shards"]).data.image_size == 224


@pytest.mark.parametrize("path", GROUPS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_composes(path: Path) -> None:
    group, choice = path.parent.name, path.stem
    if group == "source":
        config = compose("pack", [f"source={choice}"])
    else:
        plus = "+" if group in ("model", "experiment") else ""
        model = [] if group in ("model", "experiment") else ["+model=resnet"]
        config = compose("train", [f"{plus}{group}={choice}", *model])
        assert config.model._target_
    for missing in missing_keys(config):
        OmegaConf.update(config, missing, "given")
    assert len(flatten(config)) > 5
    check_targets(config)


def test_a_model_brings_its_recipe_and_the_command_line_wins() -> None:
    assert compose("train", ["+model=resnet"]).recipe.optimizer._target_ == "torch.optim.SGD"
    assert compose("train", ["+model=resnet", "recipe.optimizer.lr=0.5"]).recipe.optimizer.lr == 0.5


def test_targets_from_elsewhere_need_trust() -> None:
    config = compose("train", ["+model=resnet", "model._target_=tests.support.networks.plain"])
    with pytest.raises(ConfigError, match=r"model._target_=tests.support.networks.plain is outside"):
        check_targets(config)
    hidden = compose("train", ["+model=resnet", "+trainer.plugins=[{_target_: os.getcwd}]"])
    with pytest.raises(ConfigError, match=r"trainer.plugins.0._target_=os.getcwd is outside"):
        check_targets(hidden)
    config.trust = True
    check_targets(config)


def test_the_command_ends_in_one_line_and_exit_code_one(run_verb: Run) -> None:
    for words in (["+modle=resnet"], ["+model=resnet", "seed=[1"], ["+model=resnet", "model._target_=os.getcwd"]):
        answer = run_verb("train", *words)
        assert answer.returncode == 1
        assert answer.stderr.startswith("error: ")
        assert answer.stderr.count("\n") == 1
        assert answer.stdout == ""


def test_help_lists_what_the_verb_takes_choices_of(run_verb: Run) -> None:
    said = run_verb("report", "--help").stdout
    assert "  +model= alexnet, coatnet" in said
    assert "  recipe= adamw, " in said
    assert not re.search(r"^ *(data|augment|trainer|tracking|source)=", said, re.MULTILINE)


def test_help_and_mistakes_import_nothing_heavy(run_verb: Run) -> None:
    for words in (["--help"], ["+model=resnt"]):
        answer = run_verb("train", *words, PYTHONPROFILEIMPORTTIME="1")
        imported = {line.rpartition("|")[2].strip() for line in answer.stderr.splitlines()}
        assert "pipeline.cli.config" in imported
        assert not imported & {"torch", "numpy", "pytorch_lightning", "mlflow", "nvidia.dali", "webdataset", "pyarrow"}
    assert "python -m pipeline.train +model=resnet" in run_verb("train", "--help").stdout
