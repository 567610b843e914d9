"""A run's name, its folder, and when it may be resumed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.loading.decoder import DecoderChoice, GpuDecoder
from data.shards.dataset import Dataset, Split
from pipeline.build.parameters import load_record, with_digest
from pipeline.build.settings import RunSettings
from pipeline.cli.compose import CONF, compose
from pipeline.cli.errors import ConfigError
from pipeline.runs.fingerprint import Fingerprint, fingerprint
from pipeline.runs.restore import RestoredRun
from pipeline.runs.run import Run, open_run

DATASET = Dataset(
    Path(), Path(), "digits", ("0", "1"), (0, 0, 0), (1, 1, 1), {"train": Split((), "train.parquet", "a")}
)


def settings_of(root: Path, *words: str) -> RunSettings:
    config = compose("train", ["+model=resnet", f"runs={root}", *words])
    return RunSettings(config, num_classes=10, weights_sha256=None)


def test_the_same_command_means_the_same_run(tmp_path: Path) -> None:
    names = [open_run(settings_of(tmp_path, *words), DATASET).name for words in ((), (), ("tracking=none",))]
    assert names[0] == names[1] == names[2]
    assert names[0].startswith("resnet18-digits-")


def test_settings_that_change_the_result_change_the_name(tmp_path: Path) -> None:
    words = ([], ["seed=1"], ["recipe.epochs=9"], ["model.variant=resnet34"], ["data.batch_size=32"])
    names = {open_run(settings_of(tmp_path, *change), DATASET).name for change in words}
    other_images = replace(DATASET, splits={"train": Split((), "train.parquet", "b")})
    assert len(names | {open_run(settings_of(tmp_path), other_images).name}) == 6


def test_what_chooses_and_stops_counts_unless_it_is_the_default(tmp_path: Path) -> None:
    plain = settings_of(tmp_path)
    assert not {"choose_by", "stop_early", "min_improvement"} & {*plain.in_name, *plain.in_fingerprint}
    for words in (["choose_by=top1"], ["choose_by=val/top1"], ["stop_early=null"], ["min_improvement=0"]):
        same = settings_of(tmp_path, *words)
        assert (same.in_name, same.in_fingerprint) == (plain.in_name, plain.in_fingerprint)
    changes = (["choose_by=f1"], ["choose_by=loss"], ["stop_early=3"], ["stop_early=3", "min_improvement=0.1"])
    names = {open_run(settings_of(tmp_path, *words), DATASET).name for words in ([], *changes)}
    assert len(names) == 5
    assert settings_of(tmp_path, "choose_by=val/macro_f1").in_name == settings_of(tmp_path, "choose_by=f1").in_name


def test_averages_count_where_there_are_some(tmp_path: Path) -> None:
    plain, averaged = settings_of(tmp_path), settings_of(tmp_path, "averaging=ema")
    assert not [key for key in plain.in_fingerprint if key.startswith("averaging")]
    assert averaged.in_fingerprint == averaged.in_fingerprint | {"averaging.decay": 0.9998, "averaging.every": 1}
    assert averaged.in_fingerprint != settings_of(tmp_path, "averaging=ema", "averaging.every=2").in_fingerprint
    assert settings_of(tmp_path, "checkpoint.keep=5").in_fingerprint == plain.in_fingerprint


def test_mixing_counts_where_it_is_on(tmp_path: Path) -> None:
    plain, same = settings_of(tmp_path), settings_of(tmp_path, "mix=none")
    assert not [key for key in {**plain.in_name, **plain.in_fingerprint} if key.startswith("recipe.mix")]
    assert (same.in_name, same.in_fingerprint) == (plain.in_name, plain.in_fingerprint)
    changes = ([], ["mix=mixup"], ["mix=mixup", "recipe.mix.off_epoch=3"], ["mix=cutmix"])
    assert len({open_run(settings_of(tmp_path, *words), DATASET).name for words in changes}) == 4


def test_moving_a_class_changes_neither_name_nor_fingerprint(tmp_path: Path) -> None:
    here = settings_of(tmp_path)
    moved = settings_of(tmp_path, "classifier._target_=models.elsewhere.ResidualClassifier")
    other = settings_of(tmp_path, "classifier._target_=models.learning.families.SequentialClassifier")
    theirs = settings_of(tmp_path, "recipe.optimizer._target_=torch.elsewhere.SGD")
    assert (moved.in_name, moved.in_fingerprint) == (here.in_name, here.in_fingerprint)
    assert len({open_run(settings, DATASET).name for settings in (here, moved, other, theirs)}) == 3


def test_moving_a_class_inside_a_list_changes_nothing(tmp_path: Path) -> None:
    plugins = "+trainer.plugins=[{{_target_:pipeline.{}.Plugin,sizes:[1,2]}}]"
    here, moved = (settings_of(tmp_path, plugins.format(module)) for module in ("train.here", "moved.there"))
    assert here.parameters != moved.parameters
    assert here.in_name == moved.in_name
    assert here.in_name["trainer.plugins"] == [{"_target_": "pipeline.Plugin", "sizes": [1, 2]}]


def test_targets_of_the_project_differ_by_package_and_name() -> None:
    texts = [path.read_text() for path in CONF.rglob("*.yaml")]
    targets = {target for text in texts for target in re.findall(r"_target_: ((?:models|data|pipeline)\.\S+)", text)}
    assert len(targets) >= 20
    assert len({(target.partition(".")[0], target.rpartition(".")[2]) for target in targets}) == len(targets)


def test_a_run_of_somebody_else_builds_nothing_untrusted(tmp_path: Path) -> None:
    (tmp_path / "fingerprint.json").write_text('{"precision": "32-true"}')
    for words in (["data._target_=os.getcwd"], ["model._target_=os.getcwd"], ["recipe.loss._target_=os.getcwd"]):
        (tmp_path / "config.yaml").write_text(settings_of(tmp_path, *words).record)
        with pytest.raises(ConfigError, match=r"_target_=os.getcwd is outside"):
            RestoredRun(tmp_path)
        assert RestoredRun(tmp_path, trust=True).network == "resnet18"
    (tmp_path / "config.yaml").write_text(settings_of(tmp_path).record)
    assert RestoredRun(tmp_path).build_recipe().epochs == 6


def test_a_changed_config_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    text = with_digest(settings_of(tmp_path).record)
    for changed in (text.replace("seed: 0", "seed: 1"), text[:-100]):
        file.write_text(changed)
        with pytest.raises(ValueError, match=r"config.yaml has changed since it was written: remove its first line"):
            load_record(file)
    file.write_text(text)
    assert load_record(file).seed == 0
    file.write_text(text.partition("\n")[2].replace("seed: 0", "seed: 1"))
    assert load_record(file).seed == 1


def test_crops_that_were_recorded_under_another_module_are_found(tmp_path: Path) -> None:
    file, text = tmp_path / "config.yaml", settings_of(tmp_path).record
    before = text.replace("data.augment.crops.", "data.loading.crops.")
    assert before.count("data.loading.crops.") == 2
    file.write_text(with_digest(before))
    assert load_record(file).augment.evaluation._target_ == "data.augment.crops.EvaluationCrop"


def test_a_damaged_id_of_a_page_is_none(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for content, expected in ((b"1a2b\n", "1a2b"), (b"\xff\xfe", ""), (b"a/b c", ""), (b"", "")):
        run.tracking_id_file.write_bytes(content)
        assert run.tracking_id == expected


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    for expected in ("mine", "mine-2", "mine-3"):
        run = open_run(settings_of(tmp_path, "name=mine"), DATASET)
        assert run.name == expected
        run.folder.mkdir()
        again = open_run(settings_of(tmp_path, "name=mine"), DATASET)
        assert again.folder == run.folder, "an unfinished run continues"
        run.finish({})


def test_a_run_resumes_only_with_its_own_settings(tmp_path: Path) -> None:
    def current(
        *words: str, global_batch_size: int = 64, precision: str = "32-true", decoder: GpuDecoder | None = None
    ) -> Fingerprint:
        deciding, size = settings_of(tmp_path, *words).in_fingerprint, global_batch_size
        return fingerprint(deciding, DATASET, global_batch_size=size, precision=precision, decoder=decoder)

    run = open_run(settings_of(tmp_path, "name=mine"), DATASET)
    run.begin(current(), "")
    run.check(current("seed=1"))  # without a checkpoint it starts over
    torch.save({"global_step": 20}, run.checkpoints.path / "last.ckpt")
    # Other devices and other batches of the same sum are the same run.
    for same in (
        ("log_every=1",),
        ("data.batch_size=32", "recipe.accumulate=2"),
        ("trainer=ddp", "data.threads=3"),
        ("data.decoder=cpu", "data.prefetch=3"),
        ("data.root=s3://bucket/tars", "data.inflight=8", "data.cache=folder", "data.cache_gb=1.5"),
    ):
        run.check(current(*same))
    for name, other in (
        ("seed", current("seed=1")),
        ("recipe.optimizer.lr", current("recipe.optimizer.lr=0.2")),
        ("global_batch_size", current(global_batch_size=128)),
        ("precision", current(precision="bf16-mixed")),
        ("data.decoder", current(decoder=GpuDecoder())),
        ("trainer.limit_train_batches", current("+trainer.limit_train_batches=3")),
    ):
        with pytest.raises(ValueError, match=f"mine was started with {name}="):
            run.check(other)


@pytest.mark.parametrize("decoder", [None, GpuDecoder(), GpuDecoder(regions=False, hardware_load=0.0)])
def test_a_run_keeps_its_decoder(tmp_path: Path, decoder: GpuDecoder | None) -> None:
    run = open_run(settings_of(tmp_path, "name=mine"), DATASET)
    run.begin(fingerprint({}, DATASET, global_batch_size=1, precision="32-true", decoder=decoder), "")
    assert run.decoder is None, "without a checkpoint it starts over"
    torch.save({"global_step": 20}, run.checkpoints.path / "last.ckpt")
    assert run.decoder == DecoderChoice(decoder, "as the run began")


def test_another_nvjpeg_is_another_run_where_it_decodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def current(version: tuple[int, ...], decoder: GpuDecoder | None) -> Fingerprint:
        monkeypatch.setattr("pipeline.runs.fingerprint.loaded_nvjpeg", lambda: (version, "FILE"))
        return fingerprint({}, DATASET, global_batch_size=1, precision="32-true", decoder=decoder)

    run = open_run(settings_of(tmp_path, "name=mine"), DATASET)
    run.begin(current((13, 3, 2), GpuDecoder()), "")
    torch.save({"global_step": 20}, run.checkpoints.path / "last.ckpt")
    run.check(current((13, 3, 2), GpuDecoder()))
    with pytest.raises(ValueError, match=r"mine was started with nvJPEG=13\.3\.2, not 13\.0\.1"):
        run.check(current((13, 0, 1), GpuDecoder()))
    assert current((13, 3, 2), None) == current((13, 0, 1), None)


@pytest.mark.parametrize("damaged", ["", "[]", "{", '{"data.decoder": {"speed": 3}}', '"text"', "null"])
def test_a_damaged_fingerprint_is_named(tmp_path: Path, damaged: str) -> None:
    run = open_run(settings_of(tmp_path), DATASET)
    run.begin({"seed": 0}, "")
    (run.checkpoints.path / "last.ckpt").touch()
    run.fingerprint_file.write_text(damaged)
    for use in (lambda: run.decoder, lambda: run.check({"seed": 0})):
        with pytest.raises(ValueError, match=r"fingerprint.json is damaged \(.*\): train again with name=NAME or an"):
            use()
