"""Published files load by name or by order; files that do not fit are refused, naming the differences."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from models.attention import resize_table
from models.layers import ConvNet
from models.learning.families import ResidualClassifier
from models.weights.load import load_weights
from tests.support.networks import build, make_recipe, scatter

State = dict[str, Tensor]


def in_alphabet(state: State) -> State:
    """A state dict in the order of safetensors, not of registration."""
    return {name: state[name].contiguous() for name in sorted(state)}


def as_facebook(state: State) -> State:
    """torchvision's ConvNeXt with Facebook's names and order: all downsampling layers first."""
    renamed, first = {}, {}
    parts = {"0": "dwconv", "2": "norm", "3": "pwconv1", "5": "pwconv2"}
    for name, tensor in state.items():
        if match := re.fullmatch(r"features\.0\.(\d)\.(\w+)", name):
            first[f"downsample_layers.0.{match[1]}.{match[2]}"] = tensor
        elif match := re.fullmatch(r"features\.([246])\.(\d)\.(\w+)", name):
            first[f"downsample_layers.{int(match[1]) // 2}.{match[2]}.{match[3]}"] = tensor
        elif match := re.fullmatch(r"features\.([1357])\.(\d+)\.layer_scale", name):
            renamed[f"stages.{int(match[1]) // 2}.{match[2]}.gamma"] = tensor.flatten()
        elif match := re.fullmatch(r"features\.([1357])\.(\d+)\.block\.(\d)\.(\w+)", name):
            renamed[f"stages.{int(match[1]) // 2}.{match[2]}.{parts[match[3]]}.{match[4]}"] = tensor
        else:
            renamed[name.replace("classifier.0", "norm").replace("classifier.2", "head")] = tensor
    return first | renamed


def with_unknown_names(net: nn.Module) -> State:
    """Tensors under unknown names, in the order of registration."""
    return {f"part{place}.kernel": tensor for place, tensor in enumerate(net.state_dict().values())}


def torchvisions(name: str) -> nn.Module:
    torch.manual_seed(0)
    return scatter(torchvision.models.get_model(name)).eval()


def timms(name: str) -> nn.Module:
    torch.manual_seed(0)
    return scatter(timm.create_model(name)).eval()


def assert_same(net: ConvNet, original: nn.Module, side: int = 64) -> None:
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        logits, expected = net.eval()(images), original.eval()(images)
    assert expected.norm() > 0
    assert (logits - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("architecture", "variant", "original", "source"),
    [
        ("resnet", "resnet18", torchvisions, "torchvision and timm"),
        ("alexnet", "alexnet", torchvisions, "torchvision"),
        ("mobilenet", "mobilenet_v2", torchvisions, "torchvision"),
        ("efficientnet", "efficientnet_b0", torchvisions, "torchvision"),
        ("convnext", "convnext_tiny", torchvisions, "torchvision"),
        ("mobilenet", "mobilenet_v1:mobilenetv1_100", timms, "timm"),
        ("mobilenet", "mobilenet_v3_large:mobilenetv3_large_100", timms, "timm"),
        ("efficientnet", "efficientnet_b5", timms, "timm"),
        ("convnext", "convnext_tiny", timms, "timm"),
        ("convnext", "convnext_nano", timms, "timm"),
        ("coatnet", "coatnet_0:coatnet_0_224", timms, "timm"),
    ],
)
def test_a_file_without_order_is_matched_by_name(
    architecture: str, variant: str, original: Callable[[str], nn.Module], source: str, tmp_path: Path
) -> None:
    ours, _, theirs = variant.partition(":")
    publishers = original(theirs or ours)
    save_file(in_alphabet(publishers.state_dict()), tmp_path / "weights.safetensors")
    net = build(architecture, ours, image_size=224)
    loaded = load_weights(net, tmp_path / "weights.safetensors")
    assert loaded.layout == source
    assert not loaded.left_out
    assert not loaded.kept
    assert_same(net, publishers, side=224 if architecture == "coatnet" else 65)


def test_timms_vgg_is_reshaped(tmp_path: Path) -> None:
    original = timms("vgg11_bn")
    save_file(in_alphabet(original.state_dict()), tmp_path / "weights.safetensors")
    net = build("vgg", "vgg11_bn")
    loaded = load_weights(net, tmp_path / "weights.safetensors")
    assert loaded.reshaped == ("pre_logits.fc1.weight", "pre_logits.fc2.weight")
    assert_same(net, original, side=224)


def test_facebooks_convnext_loads(tmp_path: Path) -> None:
    original = torchvisions("convnext_tiny")
    torch.save({"model": as_facebook(original.state_dict())}, tmp_path / "convnext_tiny_1k_224_ema.pth")
    net = build("convnext", "convnext_tiny", image_size=224)
    loaded = load_weights(net, tmp_path / "convnext_tiny_1k_224_ema.pth")
    assert (loaded.layout, loaded.wrapper) == ("Facebook's ConvNeXt", "model")
    assert_same(net, original)


def test_unknown_names_are_matched_by_order(tmp_path: Path) -> None:
    original = torchvisions("mobilenet_v2")
    torch.save(with_unknown_names(original), tmp_path / "weights.pt")
    net = build("mobilenet", "mobilenet_v2", image_size=224)
    loaded = load_weights(net, tmp_path / "weights.pt")
    assert "order" in str(loaded)
    assert_same(net, original)
    save_file(in_alphabet(with_unknown_names(original)), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="keeps no order"):
        load_weights(net, tmp_path / "weights.safetensors")


def test_averaged_weights_precede_the_latest(tmp_path: Path) -> None:
    latest, averaged = torchvisions("resnet18"), scatter(torchvisions("resnet18"), seed=1)
    average = {"n_averaged": torch.tensor(7), **{f"module.{name}": t for name, t in averaged.state_dict().items()}}
    torch.save({"model": latest.state_dict(), "model_ema": average, "epoch": 3}, tmp_path / "checkpoint.pth")
    net = build("resnet", "resnet18", image_size=224)
    assert "in model_ema" in str(load_weights(net, tmp_path / "checkpoint.pth"))
    assert_same(net, averaged)


def test_our_own_checkpoint_brings_its_norm_constant(tmp_path: Path) -> None:
    original = timms("mobilenetv3_small_100")  # eps 1e-5 where the paper has 1e-3
    torch.save(original.state_dict(), tmp_path / "timm.pth")
    net = build("mobilenet", "mobilenet_v3_small", image_size=224)
    assert load_weights(net, tmp_path / "timm.pth").norm_eps == 1e-5
    module = ResidualClassifier(net, num_classes=1000, recipe=make_recipe())
    load_weights(net, tmp_path / "timm.pth")  # the module has initialised the network
    checkpoint = {"state_dict": module.state_dict(), "epoch": 1}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "best.ckpt")
    again = build("mobilenet", "mobilenet_v3_small", image_size=224)
    loaded = load_weights(again, tmp_path / "best.ckpt")
    assert (loaded.is_ours, loaded.norm_eps, loaded.image_size) == (True, 1e-5, 224)
    assert_same(again, original)
    resumed = ResidualClassifier(build("mobilenet", "mobilenet_v3_small"), num_classes=1000, recipe=make_recipe())
    resumed.on_load_checkpoint(checkpoint)
    assert {layer.eps for layer in resumed.net.modules() if isinstance(layer, nn.BatchNorm2d)} == {1e-5}


def test_the_head_is_replaced_on_request(tmp_path: Path) -> None:
    original = torchvisions("resnet18")
    torch.save(original.state_dict(), tmp_path / "weights.pth")
    net = build("resnet", "resnet18", num_classes=10, image_size=224)
    initial = net.head.linear.weight.clone()
    with pytest.raises(ValueError, match=r"fc.weight \(1000, 512\), fc.bias .* head=replace"):
        load_weights(net, tmp_path / "weights.pth")
    assert torch.equal(net.head.linear.weight, initial)
    loaded = load_weights(net, tmp_path / "weights.pth", head="replace")
    assert loaded.left_out == ("fc.weight", "fc.bias")
    assert loaded.kept == ("head.linear.weight", "head.linear.bias")
    assert torch.equal(net.head.linear.weight, initial)
    assert "; newly initialised: head.linear.weight, head.linear.bias" in str(loaded)
    original.fc = net.head.linear
    assert_same(net, original)


def test_the_stem_is_adapted_on_request(tmp_path: Path) -> None:
    original = torchvisions("resnet18")
    torch.save(original.state_dict(), tmp_path / "weights.pth")
    grey = build("resnet", "resnet18", in_channels=1, image_size=224).eval()
    with pytest.raises(ValueError, match=r"conv1.weight \(64, 3, 7, 7\) .*stem=adapt"):
        load_weights(grey, tmp_path / "weights.pth")
    loaded = load_weights(grey, tmp_path / "weights.pth", stem="adapt")
    assert loaded.reshaped == ("conv1.weight",)
    images = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        expected = original(images.expand(-1, 3, -1, -1))  # a grey image in three channels
        assert (grey(images) - expected).norm() <= 1e-5 * expected.norm()
        wide = build("resnet", "resnet18", in_channels=6, image_size=224).eval()
        load_weights(wide, tmp_path / "weights.pth", stem="adapt")
        colours = torch.randn(2, 3, 64, 64)
        expected = original(colours)
        assert (wide(colours.repeat(1, 2, 1, 1)) - expected).norm() <= 1e-5 * expected.norm()


def test_a_table_of_relative_biases_is_resized_to_other_image_sizes(tmp_path: Path) -> None:
    original = build("coatnet", "coatnet_0", image_size=64)
    scatter(original)
    torch.save(original.state_dict(), tmp_path / "weights.pth")
    net = build("coatnet", "coatnet_0", image_size=48)
    loaded = load_weights(net, tmp_path / "weights.pth")
    assert len(loaded.reshaped) == 7
    table = original.stages.stage3[0].attention.bias.table
    assert torch.allclose(net.stages.stage3[0].attention.bias.table, resize_table(table, 12, width=12))


def test_old_files_without_counters_load(tmp_path: Path) -> None:
    original = torchvisions("resnet18")
    state = {name: tensor for name, tensor in original.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "weights.pth")
    net = build("resnet", "resnet18", image_size=224)
    loaded = load_weights(net, tmp_path / "weights.pth")
    assert (loaded.num_tensors, loaded.kept) == (102, ())
    assert_same(net, original)


def test_skipped_tensors_may_be_left_out(tmp_path: Path) -> None:
    original = torchvisions("resnet18")
    torch.save({**original.state_dict(), "extra.weight": torch.zeros(3)}, tmp_path / "weights.pth")
    small = build("resnet", "resnet18", image_size=32)
    loaded = load_weights(small, tmp_path / "weights.pth", skip=["extra", "conv1", "stem.0.0."])
    assert loaded.left_out == ("conv1.weight", "extra.weight")
    assert loaded.kept == ("stem.0.0.weight",)
    assert torch.equal(small.stages.stage4[1].conv2[0].weight, original.layer4[1].conv2.weight)


def test_variants_ported_from_tensorflow_are_refused(tmp_path: Path) -> None:
    """They have timm's names and shapes but TensorFlow's padding, which no tensor shows."""
    state = timms("tf_mobilenetv3_small_100").state_dict()
    name = "tf_mobilenetv3_small_100"
    cached = tmp_path / f"models--timm--{name}.in1k" / "snapshots" / "0123abc" / "model.pth"
    for place in (tmp_path / f"{name}.pth", tmp_path / f"{name}.in1k" / "model.pth", cached):
        place.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, place)
        with pytest.raises(ValueError, match="pad their images as TensorFlow does"):
            load_weights(build("mobilenet", "mobilenet_v3_small"), place)
    torch.save(build("lenet", "lenet5").state_dict(), tmp_path / "tf_lenet.pth")
    assert load_weights(build("lenet", "lenet5"), tmp_path / "tf_lenet.pth").num_tensors == 10


def test_a_given_norm_constant_precedes_the_files(tmp_path: Path) -> None:
    torch.save(timms("mobilenetv3_small_100").state_dict(), tmp_path / "weights.pth")
    net = build("mobilenet", "mobilenet_v3_small", norm_eps=2e-3)
    assert load_weights(net, tmp_path / "weights.pth", norm_eps=2e-3).norm_eps == 2e-3
    assert {layer.eps for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)} == {2e-3}


def test_half_precision_is_read(tmp_path: Path) -> None:
    original = torchvisions("resnet18").half()
    torch.save(original.state_dict(), tmp_path / "weights.pth")
    net = build("resnet", "resnet18", in_channels=1, image_size=224)
    load_weights(net, tmp_path / "weights.pth", stem="adapt")
    assert net.stem[0][0].weight.dtype == torch.float32
    assert torch.equal(net.stem[0][0].weight, original.conv1.weight.float().sum(1, keepdim=True))


def damaged(state: State, how: str) -> State:
    """A state dict of ResNet-18 with one thing wrong."""
    if how == "missing":
        del state["layer2.0.conv1.weight"]
    elif how == "missing bias":
        del state["layer2.0.bn1.bias"]
    elif how == "shape":
        state["layer3.1.conv2.weight"] = torch.zeros(256, 256, 1, 1)
    elif how == "renamed":
        state["layer2.0.bn1.weight"] = state.pop("layer1.0.bn1.weight")
        state["layer3.9.bn1.weight"] = torch.zeros(64)
    elif how == "many":
        state = {name: tensor for name, tensor in state.items() if not name.startswith("layer4")}
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"the file lacks stages.stage2.0.conv1.0.weight \(128, 64, 3, 3\); skip"),
        ("missing bias", r"the file lacks stages.stage2.0.conv1.1.bias \(128,\)"),
        ("shape", r"layer3.1.conv2.weight \(256, 256, 1, 1\) for stages.stage3.1.conv2.0.weight \(256, 256, 3, 3\)"),
        ("renamed", r"lacks .*stages.stage1.0.conv1.1.weight .*has no place for .*layer3.9.bn1.weight \(64,\)"),
        ("many", r"the file lacks stages.stage4.0.conv1.0.weight .*, .*, .* and 27 more"),
    ],
)
def test_differences_are_named(how: str, message: str, tmp_path: Path) -> None:
    state = damaged(dict(torchvisions("resnet18").state_dict()), how)
    torch.save(state, tmp_path / "weights.pth")
    net = build("resnet", "resnet18", image_size=224)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(net, tmp_path / "weights.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize(
    ("architecture", "variant", "original"),
    [
        ("resnet", "resnet34", "resnet18"),
        ("resnet", "wide_resnet50_2", "resnet50"),
        ("resnext", "resnext50_32x4d", "resnet50"),
        ("mobilenet", "mobilenet_v2", "mobilenet_v3_small"),
        ("vgg", "vgg11", "alexnet"),
        ("convnext", "convnext_tiny", "efficientnet_b0"),
        ("efficientnet", "efficientnet_b1", "efficientnet_b0"),
    ],
)
def test_the_file_of_another_network_is_refused(architecture: str, variant: str, original: str, tmp_path: Path) -> None:
    save_file(in_alphabet(torchvisions(original).state_dict()), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"does not fit this network: .*(the file lacks|\) and \d+ more for stages)"):
        load_weights(build(architecture, variant), tmp_path / "weights.safetensors")


def test_our_own_file_of_another_variant_is_refused(tmp_path: Path) -> None:
    torch.save(build("resnet", "resnet34").state_dict(), tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match=r"the network has no place for stages.stage1.2.conv1.0.weight"):
        load_weights(build("resnet", "resnet18"), tmp_path / "weights.ckpt")
    torch.save(build("resnet", "resnet18", num_classes=10).state_dict(), tmp_path / "ten.ckpt")
    with pytest.raises(ValueError, match=r"head.linear.weight \(10, 512\).* head=replace"):
        load_weights(build("resnet", "resnet18"), tmp_path / "ten.ckpt")
    loaded = load_weights(build("resnet", "resnet18"), tmp_path / "ten.ckpt", head="replace")
    assert loaded.kept == ("head.linear.weight", "head.linear.bias")


@pytest.mark.parametrize("skip", [[""], ["layr4"], ["head.linear", "nothing"], ["layer"], [1]])
def test_an_unknown_skip_is_refused(skip: list[object], tmp_path: Path) -> None:
    torch.save(torchvisions("resnet18").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"^skip=\S* matches no tensor or module"):
        load_weights(build("resnet", "resnet18"), tmp_path / "weights.pth", skip=skip)


@pytest.mark.parametrize(
    ("architecture", "variant"), [("resnet", "resnet18"), ("alexnet", "alexnet"), ("vgg", "vgg11")]
)
def test_networks_for_small_and_large_images_are_distinguished(architecture: str, variant: str, tmp_path: Path) -> None:
    small, large = (build(architecture, variant, image_size=size) for size in (32, 224))
    torch.save(torchvisions(variant).state_dict(), tmp_path / "large.pth")
    with pytest.raises(ValueError, match=r"network was built for small images, image_size=224 builds the publ"):
        load_weights(small, tmp_path / "large.pth")
    torch.save(small.state_dict(), tmp_path / "small.pth")
    with pytest.raises(ValueError, match=r"file's network was built for small images, image_size=64 does so"):
        load_weights(large, tmp_path / "small.pth")


def test_wider_layers_are_not_blamed_on_the_image_size(tmp_path: Path) -> None:
    torch.save(torchvisions("efficientnet_b1").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="does not fit this network") as error:
        load_weights(build("efficientnet", "efficientnet_b2", image_size=224), tmp_path / "weights.pth")
    assert "small images" not in str(error.value)
    assert "stem=" not in str(error.value)


def test_a_skipped_head_cannot_be_replaced(tmp_path: Path) -> None:
    torch.save(torchvisions("resnet18").state_dict(), tmp_path / "weights.pth")
    net = build("resnet", "resnet18", num_classes=10, image_size=224)
    with pytest.raises(ValueError, match=r"layer4.1.bn2.running_var .* are not the last layer of a classifier"):
        load_weights(net, tmp_path / "weights.pth", head="replace", skip=["fc", "head"])
    torch.save({"scale": torch.ones(3)}, tmp_path / "one.pth")
    with pytest.raises(ValueError, match=r"scale \(3,\) are not the last layer of a classifier"):
        load_weights(net, tmp_path / "one.pth", head="replace")
    everything = ["scale", "stem", "stages", "head"]
    assert load_weights(net, tmp_path / "one.pth", stem="adapt", skip=everything).num_tensors == 0


def test_a_tensor_missing_from_our_own_file_is_named(tmp_path: Path) -> None:
    state = build("lenet", "lenet5").state_dict()
    state["stages.stage1.9.weight"] = state.pop("stages.stage1.1.weight")
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(
        ValueError, match=r"lacks stages.stage1.1.weight .* and the network has no place for stages.stage1.9.weight"
    ):
        load_weights(build("lenet", "lenet5"), tmp_path / "weights.pth")
