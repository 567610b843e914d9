"""What a config may name without trust: each key's own modules and kinds."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from omegaconf import DictConfig, OmegaConf

from pipeline.build.objects import build_object, find_target
from pipeline.cli.compose import CONF, compose, known_keys
from pipeline.cli.errors import ConfigError
from pipeline.cli.hooks import LAUNCHERS, check_hooks
from pipeline.cli.targets import GROUPS, check_place
from tests.support.paths import ROOT

ACCEPTED = {
    "model": ("torchvision.models.densenet121", "torchvision.models.get_model", "models.layers.conv_norm"),
    "model.norm": ("torch.nn.BatchNorm2d",),
    "classifier": ("models.learning.classifier.Classifier",),
    "recipe.optimizer": ("torch.optim.AdamW", "torch.optim.LBFGS", "timm.optim.Lion"),
    "recipe.loss": ("torch.nn.CrossEntropyLoss", "torch.nn.functional.cross_entropy"),
    "callbacks.x": (
        "pytorch_lightning.callbacks.LearningRateMonitor",
        "pipeline.train.callbacks.early_stopping.StopEarly",
    ),
    "trainer.strategy": ("pytorch_lightning.strategies.DDPStrategy",),
    "trainer.profiler": ("pytorch_lightning.profilers.SimpleProfiler",),
    "trainer.plugins.0": (
        "pytorch_lightning.plugins.precision.HalfPrecision",
        "pytorch_lightning.plugins.environments.SLURMEnvironment",
    ),
    "tracking": ("pipeline.tracking.tracker.Tracker",),
    "source": ("data.shards.sources.folder",),
}


@pytest.mark.parametrize("key", ACCEPTED)
def test_a_key_takes_its_classes_and_functions(key: str) -> None:
    for target in ACCEPTED[key]:
        check_place(key, target)
        assert callable(find_target(target, key, trusted=False))


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    message = "AdamW needs schedulefree, which is not installed: python -m pip install schedulefree$"
    with pytest.raises(ValueError, match=message):
        find_target("schedulefree.AdamW", "recipe.optimizer", trusted=False)
    with pytest.raises(ValueError, match="does not exist: "):
        find_target("no_such_library.AdamW", "recipe.optimizer", trusted=True)


def test_every_target_of_the_configs_is_accepted() -> None:
    found = set()
    for group in ("model", "optimizer", "schedule", "loss", "augment", "tracking", "trainer"):
        for path in (CONF / group).glob("*.yaml"):
            words = [f"{'+' * (group == 'model')}{group}={path.stem}", *([] if group == "model" else ["+model=lenet"])]
            values = known_keys(compose("train", words)).items()
            found |= {(key.removesuffix("._target_"), str(value)) for key, value in values if key.endswith("_target_")}
    assert len(found) >= 25
    for key, target in found:
        check_place(key, target)
        find_target(target, key, trusted=False)


def test_the_documentation_lists_the_modules_of_every_key() -> None:
    table = dict(re.findall(r"^\| `([a-z.]+)` \| (.*?) \|", (ROOT / "docs" / "extending.md").read_text(), re.MULTILINE))
    ours = {"data", "weights", "trainer.strategy", "trainer.plugins", "trainer.profiler"}
    assert table.keys() == GROUPS.keys() - ours
    for key, modules in table.items():
        places = {name.rstrip("/").replace("/", ".") for name in re.findall(r"`(.*?)`", modules)}
        assert places == set(GROUPS[key].places), key


def test_a_function_of_ones_own_must_say_what_it_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("models.layers")  # a module that exists, with other content
    code = "from torch import nn\ndef good() -> nn.Module: return nn.ReLU()\ndef bare(): return nn.ReLU()\n"
    exec(code, vars(module))
    monkeypatch.setitem(sys.modules, "models.layers", module)
    monkeypatch.setattr("models.layers", module)
    assert repr(build_object(config_of("models.layers.good"), "model", kind=object)) == "ReLU()"
    with pytest.raises(ConfigError, match="or a function annotated to return one: add trust=true to the command"):
        build_object(config_of("models.layers.bare"), "model", kind=object)


def config_of(target: str) -> DictConfig:
    return OmegaConf.create({"model": {"_target_": target}})


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_documented_launchers_need_no_trust(launcher: str) -> None:
    options = {
        "_target_": launcher, "partition": "gpu", "timeout_min": 60, "setup": None, "additional_parameters": {},
        "submitit_folder": "${hydra.sweep.dir}/.submitit/%j", "gres": "gpu:8", "stderr_to_stdout": False,
    }  # fmt: skip
    config = compose("train", ["+model=lenet"], with_hydra=True)
    with_launcher(config, options)
    check_hooks(config)
    for option, value in (("setup", ["touch ran"]), ("python", "touch ran; python"), ("comment", "x\ntouch ran")):
        with_launcher(config, {**options, option: value})
        with pytest.raises(ConfigError, match=f"hydra.launcher.{option}="):
            check_hooks(config)


def with_launcher(config: DictConfig, options: dict[str, object]) -> None:
    OmegaConf.set_struct(config, False)
    OmegaConf.set_readonly(config.hydra, False)
    config.hydra.launcher = OmegaConf.create(options)


def test_folders_and_names_of_hydra_need_no_trust(tmp_path: Path) -> None:
    # Those that Lightning gives to the ranks that it starts, and those of sweeps.
    words = [f"hydra.run.dir={tmp_path}", "hydra.job.name=train_ddp_process_1", "hydra.output_subdir=null"]
    check_hooks(
        compose("train", ["+model=lenet", *words, "hydra.sweep.subdir=x", "hydra.verbose=true"], with_hydra=True)
    )
