"""Every mistake on a command line is answered in one sentence; every config composes."""

from __future__ import annotations

import gc
import re
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from data.arguments import ArgumentError as DataError
from models.arguments import ArgumentError as ModelError
from pipeline.build.network import build_network, build_recipe
from pipeline.build.objects import build_object
from pipeline.cli.check import check_command_line
from pipeline.cli.compose import CONF, compose, flatten, known_keys
from pipeline.cli.errors import ConfigError, config_keys_in_errors
from pipeline.cli.run import check_config, fast_imports
from pipeline.cli.targets import check_targets
from pipeline.index import VERB as INDEX
from pipeline.pack import VERB as PACK
from pipeline.report.__main__ import VERB as REPORT
from pipeline.train.__main__ import VERB as TRAIN
from pipeline.workflow import VERB as WORKFLOW
from tests.support.commands import Run

NAMES = ", ".join(sorted(path.stem for path in (CONF / "model").glob("*.yaml")))
GROUPS = sorted(path for path in CONF.glob("*/*.yaml"))
# Parts with a number where other configs have null.
NUMBERED = ((), ("recipe=finetune",), ("optimizer=lamb",), ("loss=binary_cross_entropy",), ("mix=mixup",))


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
        (
            ["+model=resnet", "recipe.optimizer.lrr=3"],
            "did you mean recipe.optimizer.lr? +recipe.optimizer.lrr=VALUE passes it to torch.optim.SGD",
        ),
        (["+model=resnet", "+optim.lrr=1"], "there is no optim.lrr: did you mean recipe.optimizer.lr?"),
        (["+model=resnet", "recipe.epochs=many"], "recipe.epochs=many is not an integer (default 6)"),
        (["+model=resnet", "recipe.epochs=1.5"], "is not an integer"),
        (["+model=resnet", "recipe.epochs=true"], "is not an integer"),
        (["+model=resnet", "data.batch_size=null"], "is not an integer"),
        (["+model=resnet", "recipe.base_lr=fast"], "is not a number (default 0.256)"),
        (["+model=resnet", "recipe.optimizer.nesterov=1"], "is not true or false"),
        (["+model=resnet", "augment.training.scale=1"], "is not a list"),
        (["+model=resnet", "data=shards"], "data.root has no default: add data.root=VALUE"),
        (["model.variant=resnet50"], "no model: add +model=NAME"),
        (["+model=resnet", "+recipe.epoch=3"], "there is no recipe.epoch: did you mean recipe.epochs?"),
        (["+model=resnet", "model.num_classes=12"], "+model.num_classes=VALUE passes it to models.residual.resnet"),
        (["+model=resnet", "trainer.limit_val_batches=1"], "+trainer.limit_val_batches=VALUE passes it to pytorch_l"),
        (["+model=resnet", "data.workers=4"], "there is no data.workers: did you mean data.threads?"),
        (["+model=resnet", "+data.workers=4"], "there is no data.workers: did you mean data.threads?"),
        (["+model=resnet", "data.window=5"], "did you mean data.shuffle_window?"),
        (["+model=resnet", "recipe.label_smoothing=0"], "did you mean recipe.loss.label_smoothing?"),
        (["+model=resnet", "lr=1"], "there is no lr: did you mean recipe.optimizer.lr?"),
        (["+model=resnet", "data.root=null"], "data.root=null is not a string"),
        (["+experiment=cifar10_resnet18", "experiment=cifar10_resnet18"], "needs a plus"),
        (["+model=resnet", "policy=trivail"], "did you mean trivial?"),
        (["+model=resnet", "policy=[trivial,jitter]"], "are alternatives: choose policy=trivial or policy=jitter"),
        (["+model=resnet", "policy=trivial", "policy=jitter"], "policy=trivial and policy=jitter are alternatives"),
        (["+model=resnet", "+model=vgg"], "model=resnet and model=vgg are alternatives: choose one"),
        (["+model=resnet", "source=folder"], "train has no group source, pack has"),
        (
            ["+model=resnet,resnt", "-m"],
            f"model=resnt is not one of {NAMES}: did you mean resnet?",
        ),
        (["+model=resnet", "--lr=0.1"], "there is no flag --lr=0.1: set values with KEY=VALUE"),
        (["+model=resnet", "recipe.mix.probability=0.5"], "there is no recipe.mix.probability: mix=mixup has it"),
        (["+model=resnet", "averaging.decay=0.5"], "there is no averaging.decay: averaging=ema has it"),
        (["+model=resnet", "augment.policy.magnitude=3"], ": policy=randaugment or policy=randaugment_timm has it"),
        (["+model=resnet", "policy=trivial", "augment.policy.magnitude=3"], "did you mean augment.policy.fill?"),
        (["+model=resnet", "weights={file:a.pth,part:1}"], "there is no weights.part"),
        (["+model=resnet", "+experiment=timm_a2"], "+experiment=timm_a2 has a network: leave +model= out; model.vari"),
    ],
)
def test_a_mistake_names_the_nearest_valid_word(words: list[str], answer: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_command_line(TRAIN, words)
    assert answer in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        ["+model=resnet"],
        ["+model=resnext", "model.variant=resnext101_64x4d", "recipe.epochs=3", "recipe.clip_norm=1"],
        ["+model=resnet", "+trainer.limit_train_batches=3", "recipe.optimizer.lr=1", "seed=1"],
        ["+model=resnet", "recipe.epochs=1,2", "-m"],
        ["+model=resnet,resnext", "model.image_size=32", "hydra/launcher=basic", "-m"],
        ["+model=resnet", "+trainer.limit_val_batches=3", "trainer.devices=[0]", "data.root='2024'", "data=shards"],
        ["+experiment=cifar10_resnet18"],
        ["+model=resnet", "recipe=finetune", "recipe.layer_decay=null", "recipe.clip_norm=null"],
        ["+model=resnet", "loss=binary_cross_entropy", "recipe.loss.target_threshold=null", "recipe.base_lr=null"],
        ["+experiment=timm_a2", "model.stochastic_depth=null", "recipe.optimizer.max_grad_norm=null", "data.root='a'"],
        ["+model=resnet", "checkpoint.every_minutes=null"],
        ["--cfg", "job", "+model=resnet"],
        ["--help", "+model=resnet", "data=shards"],
        ["+model=resnet", "data.threads=2", "data.threads=null", "data.image_size=${data.batch_size}"],
    ],
)
def test_a_valid_command_line_is_unchanged(words: list[str]) -> None:
    assert sorted(check_command_line(TRAIN, words)) == sorted(words)


def test_whatever_a_config_calls_null_may_be_null() -> None:
    documented = re.compile(r"^ *(\w+): .*#.*\bnull\b", re.MULTILINE)
    names = {name for path in (CONF / "train.yaml", *GROUPS) for name in documented.findall(path.read_text())}
    assert {"every_minutes", "max_grad_norm", "target_threshold", "clip_norm", "threads"} <= names
    configs = [known_keys(compose("train", ["+model=resnet", *words])) for words in NUMBERED]
    values = {key: value for config in configs for key, value in config.items() if key.rpartition(".")[2] in names}
    keys = [key for key, value in values.items() if not str(value).startswith("${")]  # image_size has other values
    for key in keys:
        words = next(words for words, config in zip(NUMBERED, configs, strict=True) if key in config)
        check_command_line(TRAIN, ["+model=resnet", *words, f"{key}=null"])
    assert len(keys) > 15


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipe.warmup=0.2", "recipe.warmup_steps=3"], "recipe.warmup does not count beside recipe.warmup_steps=3"),
        (
            ["recipe.base_lr=1", "recipe.optimizer.lr=0.1"],
            "recipe.base_lr does not count beside recipe.optimizer.lr=0.1",
        ),
        (["recipe.epochs=3", "budget=5m"], "recipe.epochs does not count beside budget=5m: leave one of them out"),
    ],
)
def test_a_value_that_another_one_replaces_is_refused(words: list[str], message: str) -> None:
    typed = ["+model=resnet", *words]
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        check_config(compose("train", typed), typed, verb=TRAIN)
    check_config(compose("train", typed[:2]), typed[:2], verb=TRAIN)


def test_weights_is_short_for_its_file() -> None:
    words = check_command_line(TRAIN, ["+model=resnet", "weights=runs/a/best.ckpt", "weights.head=replace"])
    assert words == ["+model=resnet", "weights.file='runs/a/best.ckpt'", "weights.head=replace"]
    for text, file in (("it's (1).pth", "it's (1).pth"), ("null", None), ("12", "12"), ("'a=b'", "a=b")):
        assert compose("train", check_command_line(TRAIN, ["+model=resnet", f"weights={text}"])).weights.file == file
    (swept,) = check_command_line(TRAIN, ["+model=resnet", "weights=a.pth,b.pth", "-m"])[-1:]
    assert swept == "weights.file=a.pth,b.pth"
    with pytest.raises(ConfigError, match=r"there is no weights.heads: did you mean weights.head\?"):
        check_command_line(TRAIN, ["+model=resnet", "weights.heads=replace"])


def test_flags_are_accepted_anywhere() -> None:
    assert check_command_line(TRAIN, ["+model=resnet", "-m", "seed=1"]) == ["-m", "+model=resnet", "seed=1"]
    assert check_command_line(TRAIN, ["seed=1", "--cfg", "job", "+model=resnet"])[:2] == ["--cfg", "job"]


def test_a_root_alone_implies_data_shards() -> None:
    words = ["+model=resnet", "data.root='somewhere'"]
    assert check_command_line(TRAIN, words) == [*words, "data=shards"]
    assert compose("train", [*words, "data=shards"]).data.image_size == 224


STUDY = ("+study=digits", "study.train.runs.lenet=")
OTHER = "{overrides: [+model=lenet, +recipe.schedule.milestones=[0.1,0.2]], weights: vgg}"


def test_the_lists_and_groups_of_a_study_take_overrides() -> None:
    words = {
        "[+model=vgg, data.root=a b]": "data.root=a b",
        "[+model=vgg,'data.root=a, b']": "data.root=a, b",
        '["+model=vgg", "data.root=[x, it\'s"]': "data.root=[x, it's",
        "[+model=vgg,weights=it's.pth]": "weights=it's.pth",
        r"[+model=vgg,weights=a\,b\c]": r"weights=a,b\c",
        "[+model=vgg,augment.training.scale=[0.5,1]]": "augment.training.scale=[0.5,1]",
    }
    for typed, expected in words.items():
        listed = check_command_line(WORKFLOW, [STUDY[0], f"{STUDY[1]}{typed}"])
        assert compose("workflow", listed).study.train.runs.lenet == ["+model=vgg", expected], typed
    replaced = check_command_line(WORKFLOW, [STUDY[0], "~study.train.runs.lenet", f"+{STUDY[1]}{OTHER}"])
    assert compose("workflow", replaced).study.train.runs.lenet == {
        "overrides": ["+model=lenet", "+recipe.schedule.milestones=[0.1,0.2]"],
        "weights": "vgg",
    }


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        (f"{STUDY[1]}{OTHER}", "study.train.runs.lenet is a list: to replace it, write ~study.train.runs.lenet +study"),
        ("study.data.digits.parts=2", "+study.data.digits.parts=VALUE adds it"),
        ("study.train.runs.vgg2=[]", "did you mean study.train.runs.vgg? +study.train.runs.vgg2=VALUE adds it"),
        ("study.train.grid={seed: [0,1]}", "there is no study.train.grid.seed: +study.train.grid.seed=VALUE adds it"),
        ("study.train.grid=[0,1]", "study.train.grid is a group of keys: to replace it, write ~study.train.grid +"),
        ("~study.comparee", "there is no study.comparee: did you mean study.compare?"),
        ("study", "study has no value: study=VALUE"),
        ("jobs=[a, b", "jobs=[a, b is not KEY=VALUE in Hydra's grammar: put quotes around"),
        ("study.data.digit.pack=[]", "there is no study.data.digit.pack: did you mean study.data.digits.pack?"),
    ],
)
def test_a_key_that_a_study_does_not_have_is_answered_with_the_way_to_add_it(word: str, answer: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(answer)):
        check_command_line(WORKFLOW, [STUDY[0], word])


def test_resources_of_a_profile_take_new_keys() -> None:
    words = ["+study=digits", "profile=slurm", "profile.resources.train.mem_mb=8000"]
    words += ["+profile.resources.train.slurm_partition=gpu", "+profile.resources.train.gres=gpu:8"]
    words += ["+profile.resources.train.slurm_extra=--qos=high"]
    resources = compose("workflow", check_command_line(WORKFLOW, words)).profile.resources.train
    assert (resources.mem_mb, resources.slurm_partition, resources.gres) == (8000, "gpu", "gpu:8")
    assert resources.slurm_extra == "--qos=high"


def test_a_second_word_without_a_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="index takes one root, not one and other"):
        check_command_line(INDEX, ["one", "other"])


@pytest.mark.parametrize("path", GROUPS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_composes(path: Path) -> None:
    group, choice = path.parent.name, path.stem
    if group in ("source", "profile"):
        config = compose("pack" if group == "source" else "workflow", [f"{group}={choice}"])
    elif group == "study":
        config = compose("workflow", [f"+study={choice}"])
    else:
        plus = "+" if group in ("model", "experiment") else ""
        model = [] if group in ("model", "experiment") else ["+model=resnet"]
        config = compose("train", [f"{plus}{group}={choice}", *model])
        assert config.model._target_
    for key in [key for key, value in known_keys(config).items() if value == "???"]:
        OmegaConf.update(config, key, "given")
    assert len(flatten(config)) > 5
    check_targets(config)


@pytest.mark.parametrize("verb", ["report", "preview"])
def test_every_recipe_composes_with_the_verbs_that_read_it(verb: str) -> None:
    recipes = [path.stem for path in GROUPS if path.parent.name == "recipe"]
    assert len(recipes) >= 6
    for recipe in recipes:
        assert compose(verb, ["+model=resnet", f"recipe={recipe}"]).recipe.epochs >= 1


def test_a_model_selects_its_recipe_and_the_command_line_wins() -> None:
    assert compose("train", ["+model=resnet"]).recipe.optimizer._target_ == "torch.optim.SGD"
    assert compose("train", ["+model=resnet", "recipe.optimizer.lr=0.5"]).recipe.optimizer.lr == 0.5
    vgg = compose("train", ["+model=vgg"]).recipe
    assert (vgg.base_lr, vgg.schedule.factor, vgg.loss.label_smoothing) == (0.1, 0.1, 0.0)
    changed = compose("train", ["+model=lenet", "optimizer=adamw", "loss=label_smoothing"]).recipe
    assert (changed.optimizer.betas, changed.loss.label_smoothing) == ([0.9, 0.999], 0.1)


def test_a_group_that_a_verb_lacks_is_answered_with_those_it_has() -> None:
    with pytest.raises(ConfigError, match="report has no group data, preview and train have"):
        check_command_line(REPORT, ["+model=lenet", "data=digits"])
    with pytest.raises(ConfigError, match="pack has no group model, it takes source"):
        check_command_line(PACK, ["+model=lenet"])


def test_targets_outside_the_project_need_trust() -> None:
    config = compose("train", ["+model=resnet", "model._target_=tests.support.networks.plain"])
    with pytest.raises(ConfigError, match=r"model._target_=tests.support.networks.plain is outside"):
        check_targets(config)
    hidden = compose("train", ["+model=resnet", "+trainer.plugins=[{_target_: os.getcwd}]"])
    with pytest.raises(ConfigError, match=r"trainer.plugins.0._target_=os.getcwd is outside"):
        check_targets(hidden)
    config.trust = True
    check_targets(config)


def test_errors_name_keys_but_leave_paths_alone() -> None:
    keys = {"root": "data.root"}
    for kind in (DataError, ModelError):
        answer = "^data.root=exp/root=3 is not a folder: data.root=PATH$"
        with pytest.raises(ValueError, match=answer), config_keys_in_errors(keys):
            raise kind(("root", "exp/root=3"), " is not a folder: ", ("root", "PATH"))
    with pytest.raises(ValueError, match=r"^root=3 of another library$"), config_keys_in_errors(keys):
        raise ValueError("root=3 of another library")
    with pytest.raises(ValueError, match=r"^\(\)$"), config_keys_in_errors(keys):
        raise ValueError(())


def test_errors_name_the_keys_of_nested_arguments() -> None:
    with pytest.raises(
        ValueError, match=r"^recipe.loss=cross_entropy: recipe.loss.label_smoothing=2 must be at least 0"
    ):
        build_recipe(compose("train", ["+model=resnet", "recipe.loss.label_smoothing=2"]))
    with pytest.raises(ValueError, match=r"^augment.training.image_size=0 must be a number of pixels of at least 1"):
        build_object(compose("train", ["+model=resnet", "augment.training.image_size=0"]), "augment", kind=dict)


def test_an_option_may_have_any_name() -> None:
    with pytest.raises(ValueError, match=r"^model.rule=3 is not an option of networks: choose from num_classes"):
        build_network(compose("train", ["+model=resnet", "+model.rule=3"]))


def test_later_jobs_of_a_sweep_freeze_no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)  # as after the first job
    before = gc.get_freeze_count()
    with fast_imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before


def test_a_mistake_is_one_line_and_exit_code_one(run_verb: Run) -> None:
    for words in (["+modle=resnet"], ["+model=resnet", "seed=[1"], ["+model=resnet", "model._target_=os.getcwd"]):
        answer = run_verb("train", *words)
        assert answer.returncode == 1
        assert answer.stderr.startswith("error: ")
        assert answer.stderr.count("\n") == 1
        assert answer.stdout == ""


def test_help_lists_the_groups_of_the_verb(run_verb: Run) -> None:
    text = run_verb("report", "--help").stdout
    assert "  +model= alexnet, coatnet" in text
    assert "  recipe= adamw, " in text
    assert not re.search(r"^ *(data|augment|trainer|tracking|source)=", text, re.MULTILINE)


def test_help_and_mistakes_import_nothing_heavy(run_verb: Run) -> None:
    for words in (["--help"], ["+model=resnt"]):
        answer = run_verb("train", *words, PYTHONPROFILEIMPORTTIME="1")
        imported = {line.rpartition("|")[2].strip() for line in answer.stderr.splitlines()}
        assert "pipeline.cli.check" in imported
        assert not imported & {"torch", "numpy", "pytorch_lightning", "mlflow", "nvidia.dali", "webdataset", "pyarrow"}
    assert "python -m pipeline.train +model=resnet" in run_verb("train", "--help").stdout
