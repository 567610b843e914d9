"""The report as it is typed: what it prints, what it writes, and what it answers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hydra.errors import HydraException
from PIL import Image

from pipeline.cli.errors import ConfigError
from pipeline.report.sample_images import MEAN, STD, sample_images, to_network_input
from tests.support.commands import Run, Typed
from tests.support.images import make_jpeg, orientation
from tests.support.networks import build


def test_a_report_prints_and_writes_the_true_numbers(run_verb: Run, tmp_path: Path) -> None:
    answer = run_verb("report", "+model=resnet", "effective_images=1", COLUMNS="")  # pytest's workers have one
    assert answer.returncode == 0, answer.stderr
    for text in (
        "11,689,512",
        "1.814 G an image",
        "435x435 px at stages.stage4.1.relu",
        "(B, 256, 14, 14)",
        "head.pool",
        "offset px",  # all columns, where no terminal is too small for them
    ):
        assert text in answer.stdout
    (folder,) = (tmp_path / "reports").iterdir()
    assert folder.name.startswith("resnet18-224-")
    table = json.loads((folder / "layers.json").read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert len(rows) == 69
    assert sum(row["parameters"] for row in rows) == 11_689_512
    assert max(row["receptive_field_rows"] or 0 for row in rows) == 435
    assert pq.read_table(folder / "layers.parquet").to_pylist() == rows
    numbers = json.loads((folder / "report.json").read_text())
    assert (numbers["gmacs"], numbers["receptive_field_px"]) == (1.814073344, 435.0)
    assert numbers["stages"][3]["shape"] == [256, 14, 14]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "stages.stage4.1.conv2.0" in page
    assert str(folder.relative_to(tmp_path)) in answer.stdout


def test_check_compares_fields_with_gradients(report: Typed) -> None:
    output = report("+model=lenet", "check=true", "effective_images=0", "layers=none", "out=here")
    assert "10 of 10 fields equal the extent of their gradient" in output
    assert "effective" not in output
    assert "here/report.html" in output


def test_a_network_that_cannot_be_checked_is_still_reported(report: Typed) -> None:
    output = report("+model=lenet", "model.ops=reference", "check=true", "effective_images=0", "layers=none")
    assert "32x32 px" in output
    assert "warning: not checked: gradient unknown: " in output


def test_a_path_that_looks_like_markup_or_a_list_is_a_path(report: Typed, tmp_path: Path) -> None:
    for out in ("a[/b]", "ä=b,c [red]"):
        output = report("+model=lenet", "effective_images=0", "layers=none", f"out={out}")
        assert f"wrote {out}/report.html" in output
        assert (tmp_path / out / "report.html").is_file()


def test_other_libraries_networks_are_reported(report: Typed, tmp_path: Path) -> None:
    report("net=torchvision.models.squeezenet1_1", "data.image_size=64", "layers=none")
    report("net=timm.models.resnet10t", "trust=true", "effective_images=0", "layers=none")
    numbers = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("reports/*/report.json"))]
    assert [(one["name"], one["image"], round(one["params_millions"] * 1e6)) for one in numbers] == [
        ("timm.models.resnet10t", [3, 176, 176], 5_435_488),
        ("torchvision.models.squeezenet1_1", [3, 64, 64], 1_235_496),
    ]
    assert numbers[1]["effective_measured_with"] == "newly initialised weights, over 4 crops of china.jpg, flower.jpg"


def test_timms_default_cfg_gives_the_image_shape(report: Typed, tmp_path: Path) -> None:
    report("net=tests.support.networks.grey_by_timm", "trust=true", "effective_images=1", "layers=none", "out=here")
    numbers = json.loads((tmp_path / "here" / "report.json").read_text())
    assert numbers["image"] == [1, 20, 20]
    assert numbers["effective_measured_with"] == "the weights it is built with, over 1 crop of china.jpg"


def test_a_run_from_someone_else_is_not_trusted(report: Typed, tmp_path: Path) -> None:
    (tmp_path / "theirs" / "checkpoints").mkdir(parents=True)
    (tmp_path / "theirs" / "checkpoints" / "last.ckpt").write_bytes(b"")
    (tmp_path / "theirs" / "fingerprint.json").write_text('{"precision": "32-true"}')
    for target in ("os.system", "torch.hub.load", "pipeline.train.main"):
        model = {"_target_": "models.sequential.lenet", "dropout": {"_target_": target}}
        config = {"model": model, "recipe": {"_target_": "models.learning.recipe.Recipe"}, "data": {"image_size": 32}}
        (tmp_path / "theirs" / "config.yaml").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=f"model.dropout._target_={target} is outside models, "):
            report("run=theirs")


def test_networks_are_compared_side_by_side(run_verb: Run, tmp_path: Path) -> None:
    words = (
        "models=[lenet,resnet.resnet34,torchvision.models.squeezenet1_1]",
        "effective_images=1",
        "batch_size=2",
        "data.image_size=32",
    )
    answer = run_verb("report", *words, COLUMNS="160")
    assert answer.returncode == 0, answer.stderr
    lines = {line.split()[1]: line for line in answer.stdout.splitlines() if line.startswith("│")}
    assert lines.keys() == {"lenet5", "resnet34", "torchvision.models.squeezenet1_1"}
    assert "0.06" in lines["lenet5"]
    assert "21.79" in lines["resnet34"]  # a smaller stem
    (folder,) = (tmp_path / "reports").glob("comparison-*")
    table = pq.read_table(folder / "comparison.parquet").to_pylist()
    assert [row["network"] for row in table] == ["lenet5", "resnet34", "torchvision.models.squeezenet1_1"]
    assert all(row["images_per_second"] > 0 for row in table)
    assert [row["image"] for row in table] == [[3, 32, 32]] * 3
    # By hand; ResNet-34's small stem: 3 + 6 x 2, then 2 + 7 x 4, 4 + 11 x 8 and 8 + 5 x 16.
    fields = [(row["receptive_field_rows"], row["receptive_field_columns"]) for row in table]
    assert fields == [(32, 32), (225, 225), (207, 207)]
    assert [row["whole_image_from"] for row in table][:2] == [None, "head.pool"]
    page = (folder / "comparison.html").read_text(encoding="utf-8")
    assert "lenet5" in page
    assert "resnet34" in page


def test_a_report_uses_a_file_of_weights(report: Typed, tmp_path: Path) -> None:
    torch.save(build("lenet", "lenet5", image_size=32).state_dict(), tmp_path / "mine.pt")
    output = report("+model=lenet", "weights=mine.pt", "layers=none", "effective_images=2")
    assert "measured       with weights of mine.pt, over 2 crops of china.jpg, flower.jpg" in output
    report("+model=lenet", "weights=mine.pt", "layers=none", "effective_images=2", "precision=64-true")
    report("+model=lenet", "weights=mine.pt", "layers=all", "effective_images=2", "precision=64-true")
    assert len(list((tmp_path / "reports").glob("lenet5-32-*/report.html"))) == 2  # what differs lies apart


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no model: add +model=NAME, one of alexnet"),
        (("models=[]",), "a report needs exactly one of +model=NAME, net=FUNCTION, run=FOLDER, models="),
        (("models=[lenet]", "run=runs/mine"), "a report needs exactly one of +model=NAME, net=FUNCTION"),
        (("models=[lenet]", "check=true"), "check=true is for the report of one network"),
        (("run=nowhere",), "run=nowhere does not exist, and runs has no runs: give the folder of one"),
        (
            ("net=timm.models.resnet10t",),
            "model._target_=timm.models.resnet10t is outside models, torchvision.models, ",
        ),
        (("net=torchvision.models.vgg11",), "torchvision.models.vgg11 is not built for one image size: add"),
        (("net=os.getcwd", "trust=true"), "net=os.getcwd returns str, not Module"),
        (("+model=lenet", "out=broken.jpg/here"), "out=broken.jpg/here is not a writable folder: see "),
        (("+model=lenet", "photographs=broken.jpg"), "photographs: broken.jpg cannot be read: cannot identify"),
        (("+model=lenet", "photographs=nowhere"), "photographs=nowhere: there is no image"),
        (("+model=lenet", "data=digits"), "report has no group data, preview and train have"),
        (("+model=resnet", "layers=every"), "layers=every is not one of some, all, none"),
        (("+model=resnet", "batch_size=0"), "batch_size=0 must be an integer of at least 1"),
        (("+model=resnet", "effective_images=-1"), "effective_images=-1 must be an integer of at least 0"),
        (("+model=resnet", "data.image_size=0"), "data.image_size=0 must be an integer of at least 1"),
        (("+model=resnet", "weights=mine.pt", "effective_images=0"), "weights=mine.pt is for the effective field"),
        (("+model=resnet", "precision=8"), "precision=8 is not one of 32-true, bf16-mixed"),
        (("+model=lenet", "data.image_size=40"), "data.image_size=40 must be 28 or 32 pixels for LeNet-5"),
        (("+model=lenet", "efective_images=1"), "there is no efective_images: did you mean effective_images?"),
    ],
)
def test_settings_without_a_report_are_refused(
    report: Typed, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises((ValueError, OSError, HydraException), match=re.escape(message)):
        report(*words)
    assert not list(tmp_path.glob("**/*.html"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("models=[resnet,resnt]",), "error: models: resnt is not one of alexnet, coatnet"),
        (("models=[resnet.resnet19]", "effective_images=0"), "did you mean resnet18?"),
    ],
)
def test_an_unknown_network_of_a_comparison_is_one_sentence(
    run_verb: Run, words: tuple[str, ...], message: str
) -> None:
    answer = run_verb("report", *words)
    assert answer.returncode == 1
    assert message in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_sample_images_are_crops_in_turn_and_reproducible(tmp_path: Path) -> None:
    for number, shape in enumerate(((60, 80), (90, 50))):
        (tmp_path / f"{number}.jpg").write_bytes(make_jpeg(*shape, seed=number))
    pixels, description = sample_images(tmp_path, 4, size=(32, 48))
    assert (pixels.shape, description) == ((4, 32, 48, 3), "4 crops of 0.jpg, 1.jpg")
    assert np.array_equal(pixels, sample_images(tmp_path, 4, size=(32, 48)).pixels)
    assert sample_images(tmp_path / "1.jpg", 1, size=(8, 8)).description == "1 crop of 1.jpg"
    assert len({crop.tobytes() for crop in pixels}) == 4
    photograph = np.asarray(Image.open(tmp_path / "0.jpg"))
    assert abs(pixels[0].mean() - photograph.mean()) < 30  # of the first image, and not stretched beyond it


def test_sample_images_follow_exif_orientation(tmp_path: Path) -> None:
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20] = 255  # bright above
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=orientation(6))  # clockwise: bright to the right
    (crop,) = sample_images(tmp_path / "turned.jpg", 1, size=(20, 20)).pixels
    across, down = crop.mean((0, 2)), crop.mean((1, 2))
    assert np.ptp(across) > 200
    assert np.ptp(down) < 20


def test_sample_images_are_normalised_for_the_network() -> None:
    pixels = sample_images(None, 2, size=(8, 8)).pixels
    images = to_network_input(pixels, channels=3)
    for channel in range(3):
        expected = (pixels[..., channel] / 255 - MEAN[channel]) / STD[channel]
        assert np.allclose(images[:, channel].numpy(), expected, atol=1e-6)
    grey = to_network_input(pixels, channels=1)
    assert grey.shape == (2, 1, 8, 8)
    assert torch.allclose(grey[:, 0], images.mean(1))
