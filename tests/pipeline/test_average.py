"""Averages of checkpoints: their weights, their norms, and the run that other commands take them for."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data.shards.dataset import Dataset
from pipeline import average as average_verb
from pipeline.cli.errors import ConfigError
from pipeline.runs.checkpoints import CheckpointFolder
from pipeline.runs.restore import RestoredRun
from pipeline.runs.trained import load_model
from pipeline.train import __main__ as train_verb
from tests.support.commands import Typed, call_verb, typed

NETS = ("+model=mobilenet", "model.variant=mobilenet_v3_small", "data.batch_size=32", "trainer.precision=32-true")
SHORT = ("+trainer.limit_train_batches=2", "+trainer.limit_val_batches=1", "tracking=none")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits: Dataset, lenet_root: Path) -> Path:
    """A folder with the run `mine`, a LeNet, and `kept`, a network with batch norms and three checkpoints."""
    root = tmp_path_factory.mktemp("averaged")
    shutil.copytree(digits.root, root / "datasets" / "digits")
    shutil.copytree(lenet_root / "runs" / "mine", root / "runs" / "mine")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        words = [*NETS, *SHORT, "recipe.epochs=4", "checkpoint.keep=3", "name=kept"]
        call_verb(train_verb.VERB, train_verb.main, words)
    return root


@pytest.fixture
def average(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Run `python -m pipeline.average ...` in the folder of `trained`."""
    monkeypatch.chdir(trained)
    return typed(average_verb.VERB, average_verb.main, capsys)


def weights(file: Path) -> dict[str, np.ndarray]:
    state = torch.load(file, weights_only=True)["state_dict"]
    return {name: tensor.double().numpy() for name, tensor in state.items()}


def test_the_newest_checkpoints_of_a_run_have_a_mean(average: Typed, trained: Path) -> None:
    kept = trained / "runs" / "kept" / "checkpoints"
    files = [kept / f"step-{step}.ckpt" for step in (8, 6, 4)]
    printed = average("run=kept", "last=3", "norm_images=0", "out=plain")
    assert (
        "norms       mean of their statistics\nfolder      plain\nnext        python -m pipeline.evaluate run="
        in printed
    )
    found, parts = weights(trained / "plain" / "checkpoints" / "last.ckpt"), [weights(file) for file in files]
    assert found.keys() == parts[0].keys()
    for name, array in found.items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_allclose(array, np.mean([part[name] for part in parts], axis=0), rtol=1e-6, atol=1e-7)
    result = json.loads((trained / "plain" / "result.json").read_text())
    assert [Path(file).name for file in result["averaged"]] == [file.name for file in files]
    assert [*result["averaged"].values()] == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def test_norms_get_the_statistics_of_training_images(average: Typed, trained: Path) -> None:
    average("run=kept", "last=2", "norm_images=0", "out=mean")
    printed = average("run=kept", "last=2", "norm_images=1000", "out=estimated")
    assert "norms       statistics of 1,024 training images\n" in printed  # complete batches
    mean, found = (weights(trained / name / "checkpoints" / "last.ckpt") for name in ("mean", "estimated"))
    changed = {name for name in found if not np.array_equal(found[name], mean[name])}
    assert changed == {name for name in found if name.endswith(("running_mean", "running_var"))}
    # The first norm's input is a convolution of training crops, whose statistics do not depend on other norms.
    run = RestoredRun(trained / "estimated")
    stem = run.load_network()[0].stem
    batches = average_verb.training_images(run, 1000, device=torch.device("cpu"))
    with torch.no_grad():
        inputs = torch.cat([stem[0](images) for images in batches]).double()
    np.testing.assert_allclose(stem[1].running_mean, inputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stem[1].running_var, inputs.var((0, 2, 3), correction=0), rtol=1e-4)


def test_an_average_of_runs_is_a_run(average: Typed, trained: Path) -> None:
    first, second = (trained / "runs" / "mine" / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    printed = average(f"runs=[mine,{second}]")
    assert "norms       none\n" in printed
    assert "next        python -m pipeline.evaluate run=runs/mine-average\n" in printed
    model = load_model("latest", device="cpu")
    assert model.run.run.name == "mine-average"
    assert model.run.is_best
    state, parts = model.net.state_dict(), [weights(file) for file in (first, second)]
    for name, tensor in state.items():
        expected = (parts[0][f"net.{name}"] + parts[1][f"net.{name}"]) / 2
        np.testing.assert_allclose(tensor, expected, rtol=1e-6, atol=1e-8)
    assert model.predict([]) == []
    with pytest.raises(FileExistsError, match=r"mine-average exists already: remove it, or add out=FOLDER$"):
        average(f"runs=[mine,{second}]")


def test_an_average_leaves_every_other_file_alone(
    average: Typed, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = trained / ".git" / "HEAD"
    hidden.parent.mkdir()
    hidden.touch()

    def fail(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    before = sorted(trained.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "write", fail)
        with pytest.raises(OSError, match="No space left"):
            average("run=kept", "last=2", "norm_images=0", "out=git")
    assert sorted(trained.iterdir()) == before
    average("run=kept", "last=2", "norm_images=0", "out=git")
    assert hidden.exists()
    assert sorted(trained.iterdir()) == sorted([*before, trained / "git"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "an average needs either runs=[RUN,RUN] or run=RUN last=K"),
        (["runs=[mine,kept]", "run=mine"], "an average needs either runs="),
        (["runs=[mine,kept]", "last=2"], "run=RUN and last=K go together: the K newest checkpoints of a run"),
        (["run=kept"], "run=RUN and last=K go together"),
        (["run=kept", "last=1"], "last=1 must be an integer of at least 2"),
        (["run=kept", "last=9"], "last=9: runs/kept has "),
        (["runs=[mine]"], "runs=[mine] is one run: name two or more, or run=RUN last=K"),
        (["runs=[mine,mine]"], "mine/checkpoints/best.ckpt is named twice"),
        (["runs=[mine,mein]"], "runs=mein is not one of the "),
        (["runs=[mine,kept]"], "runs/kept and runs/mine differ in network: mobilenet_v3_small instead of lenet5; only"),
        (["run=kept", "last=2", "out=conf.txt"], "out=conf.txt is a file: give a folder"),
        (["run=kept", "last=2", "device=tpu"], "device=tpu is not "),
    ],
)
def test_averages_that_make_no_sense_are_refused(average: Typed, trained: Path, words: list[str], message: str) -> None:
    (trained / "conf.txt").touch()
    before = sorted(trained.iterdir())
    with pytest.raises((ValueError, OSError)) as error:
        average(*words)
    assert message in str(error.value)
    assert sorted(trained.iterdir()) == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("classes", ["other", *"123456789"], "differ in classes; only runs of one network, with the same classes"),
        ("mean", [0.1, 0.2, 0.3], "differ in colours (mean, std); only runs"),
    ],
)
def test_runs_of_other_data_have_no_average(
    average: Typed, trained: Path, tmp_path: Path, key: str, value: list[object], message: str
) -> None:
    other = shutil.copytree(trained / "runs" / "mine", tmp_path / "other")
    import yaml

    text = (other / "config.yaml").read_text().partition("\n")[2]
    config = yaml.safe_load(text)
    config["dataset"][key] = value
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError) as error:
        average(f"runs=[mine,{other}]")
    assert message in str(error.value)
