"""Exported files answer as the network does, in the programs for which they are made."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import webdataset
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from models.separable import mobilenet
from pipeline import load
from pipeline.export import __main__ as export_verb
from pipeline.export import files as export_files
from pipeline.runs.trained import Probabilities, TrainedModel
from tests.support.commands import Typed, call_verb
from tests.support.networks import scatter
from tests.support.saving import replace_checkpoint

PRECISIONS = {"": 1e-5, ".float16": 0.02, ".bfloat16": 0.1}


@pytest.fixture(scope="module")
def model(exported: Path) -> TrainedModel:
    return load(exported.parent, device="cpu")


def random_crops(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


def digits(root: Path) -> tuple[Tensor, Tensor]:
    """The validation split as webdataset, Pillow and torch read it: crops (N, 32, 32, 3) and labels (N,)."""
    tars = sorted(map(str, (root / "datasets" / "digits").glob("*val*.tar")))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    images = [Image.open(io.BytesIO(sample["jpg"])).convert("RGB") for sample in samples]
    labels = [int(sample["cls"]) for sample in samples]
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2)  # 8 x 8
    crops = torch.nn.functional.interpolate(pixels.float(), size=(32, 32), mode="bilinear", antialias=True)
    return crops.round().to(torch.uint8).permute(0, 2, 3, 1), torch.tensor(labels)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_onnxruntime_answers_batches_of_any_size(
    exported: Path, model: TrainedModel, precision: str, count: int
) -> None:
    session = onnxruntime.InferenceSession(exported / f"model{precision}.onnx")
    (given,), (returned,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["batch", 32, 32, 3])
    assert (returned.name, returned.type, returned.shape) == ("probabilities", "tensor(float)", ["batch", 10])
    crops = random_crops(count)
    (answers,) = session.run(None, {"images": crops.numpy()})
    expected = model(crops)
    assert expected.std() > 0.01, "answers that are all alike prove nothing"
    torch.testing.assert_close(torch.from_numpy(answers), expected, rtol=0, atol=PRECISIONS[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_program_answers_batches_of_any_size(exported: Path, model: TrainedModel, precision: str) -> None:
    program = torch.export.load(exported / f"model{precision}.pt2").module()
    for count in (1, 2, 7):
        answers = program(random_crops(count))
        assert answers.dtype == torch.float32
        torch.testing.assert_close(answers, model(random_crops(count)), rtol=0, atol=PRECISIONS[precision])


def test_onnx_files_are_valid_recent_and_name_no_machine(exported: Path) -> None:
    paths = sorted(exported.glob("*.onnx"))
    assert len(paths) == 3
    for path in paths:
        onnx.checker.check_model(path, full_check=True)
        assert onnx.load(path).opset_import[0].version == 20
        assert b".py" not in path.read_bytes()
    for precision, stored in (("float16", onnx.TensorProto.FLOAT16), ("bfloat16", onnx.TensorProto.BFLOAT16)):
        kernels = [
            one for one in onnx.load(exported / f"model.{precision}.onnx").graph.initializer if len(one.dims) == 4
        ]
        assert len(kernels) == 3
        assert {one.data_type for one in kernels} == {stored}


def test_safetensors_are_the_checkpoints_and_the_json_says_the_rest(exported: Path, model: TrainedModel) -> None:
    state = torch.load(exported.parent / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    stored = load_file(exported / "model.safetensors")
    assert {f"net.{name}" for name in stored} == set(state)
    assert all(torch.equal(tensor, state[f"net.{name}"]) for name, tensor in stored.items())
    values = json.loads((exported / "model.json").read_text())
    assert values["architecture"]["variant"] == "lenet5"
    assert values["classes"] == [str(number) for number in range(10)]
    assert values["temperature"] == 0.2
    preprocessing = values["preprocessing"]
    assert (preprocessing["size"], preprocessing["frame"], preprocessing["fit"]) == ([32, 32], [32, 32], "crop")
    assert preprocessing["mean"] == pytest.approx(model.facts.mean)
    assert {tensor.dtype for tensor in load_file(exported / "model.float16.safetensors").values()} == {torch.float16}


def test_the_record_has_digests_differences_and_accuracies(exported: Path, fitted_root: Path) -> None:
    record = json.loads((exported / "export.json").read_text())
    assert len(record["files"]) == 9
    crops, labels = digits(fitted_root)
    assert len(labels) > 300
    for name, one in record["files"].items():
        assert one["sha256"] == hashlib.sha256((exported / name).read_bytes()).hexdigest()
        assert one["largest_difference"] <= PRECISIONS["" if one["precision"] == "float32" else f".{one['precision']}"]
        assert one["val_images"] == len(labels)
        if one["format"] == "onnx":
            (answers,) = onnxruntime.InferenceSession(exported / name).run(None, {"images": crops.numpy()})
            assert one["top1"] == pytest.approx((answers.argmax(1) == labels.numpy()).mean(), abs=0.006)
    checkpoint = exported.parent / "checkpoints" / "best.ckpt"
    assert record["weights_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert record["compared_on"] == "64 images of split val of digits"


def test_a_file_that_answers_otherwise_is_not_kept(
    export: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = export_files.in_precision

    def wrong(model: TrainedModel, precision: str) -> Probabilities:
        module = right(model, precision)
        return Probabilities(module.net, model.facts, temperature=1.1 * module.temperature).eval()

    words = ("run=fitted", "format=[pt2,safetensors]", f"out={tmp_path / 'out'}")
    monkeypatch.setattr(export_files, "in_precision", wrong)
    with pytest.raises(SystemExit) as ended:
        export(*words)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: model.pt2 differs by ")
    assert "above tolerance.float32=0.0001: nothing was written" in line
    assert not (tmp_path / "out").exists()
    assert "largest difference" in export(*words, "tolerance.float32=0.1")


def test_files_of_the_same_weights_stay_listed_and_others_are_named(
    export: Typed, fitted_root: Path, tmp_path: Path
) -> None:
    out = f"out={tmp_path}"
    export("run=fitted", "format=pt2", out)
    export("run=fitted", "format=safetensors", out)
    listed = json.loads((tmp_path / "export.json").read_text())["files"]
    assert set(listed) == {"model.pt2", "model.safetensors"}
    shutil.copytree(fitted_root / "runs" / "fitted", tmp_path / "plain")
    (tmp_path / "plain" / "evaluation" / "calibration.json").unlink()
    printed = export(f"run={tmp_path / 'plain'}", "format=pt2", out)
    assert f"in {tmp_path}, of another model or changed: model.safetensors; export them again" in printed
    assert set(json.loads((tmp_path / "export.json").read_text())["files"]) == {"model.pt2"}


def test_without_the_data_set_photographs_are_compared(
    fitted_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"run={fitted_root / 'runs' / 'fitted'}", "format=pt2", "precision=float16", "out=out"]
    call_verb(export_verb.VERB, export_verb.main, words)
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["compared_on"].startswith("2 images of scikit-learn's photographs (the run's split val is not there")
    assert record["files"]["model.float16.pt2"]["top1"] is None


def test_timms_network_answers_with_the_exported_tensors(export: Typed, fitted_root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(fitted_root / "runs" / "fitted", tmp_path / "mobile")
    config = OmegaConf.load(folder / "config.yaml")
    size = config.data.image_size = config.augment.evaluation.image_size = 72
    variant = {"variant": "mobilenet_v3_small", "num_classes": 10, "image_size": size}
    config.model = {"_target_": "models.separable.mobilenet", **variant}
    OmegaConf.save(config, folder / "config.yaml")
    net = scatter(mobilenet(**variant))
    tensors = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    replace_checkpoint(folder / "checkpoints" / "best.ckpt", {"state_dict": tensors, "norm_eps": 1e-3})
    printed = export(f"run={folder}", "format=safetensors", "names=timm", "compare_images=4")
    assert "timm's mobilenetv3_small_100 needs bn_eps=0.001 for the same results" in printed
    values = json.loads((folder / "export" / "model.timm.json").read_text())
    assert values["loads_into"] == {"library": "timm", "network": "mobilenetv3_small_100"}
    theirs = timm.create_model("mobilenetv3_small_100", num_classes=10, bn_eps=values["norm_eps"]).eval()
    theirs.load_state_dict(load_file(folder / "export" / "model.timm.safetensors"), strict=True)
    crops = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(values["preprocessing"][name]) for name in ("mean", "std"))
    with torch.inference_mode():
        answers = torch.softmax(theirs(((crops / 255 - mean) / std).permute(0, 3, 1, 2)) / values["temperature"], dim=1)
    torch.testing.assert_close(answers, load(folder, device="cpu")(crops), rtol=0, atol=1e-5)
