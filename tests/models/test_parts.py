"""Layer-wise rates against timm's; frozen parts and a head that trains alone, tensor by tensor."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import pytorch_lightning as pl
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from models.layers import ConvNet, PooledLinear, conv_norm, relu
from models.learning.classifier import Classifier
from models.learning.schedules import cosine
from models.parts import frozen_parts
from models.weights.publish import publish
from pipeline.build.network import build_recipe
from pipeline.cli.compose import compose
from tests.support.networks import build, make_recipe

STEPS = 4


def normed() -> ConvNet:
    """A network with batch norms and dropout. Shapes: (N, 3, H, W) -> (N, 7)."""
    torch.manual_seed(0)
    stem = nn.Sequential(conv_norm(3, 8, kernel_size=3, activation=relu), nn.Dropout(0.5))
    stages = {name: conv_norm(8, 8, kernel_size=3, activation=relu) for name in ("stage1", "stage2")}
    return ConvNet(stem, stages, head=PooledLinear(8, 7))


class States(pl.Callback):
    """The network's tensors, and the modes of its parts, after each step."""

    def __init__(self) -> None:
        self.tensors: list[dict[str, Tensor]] = []
        self.modes: list[dict[str, bool]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: object) -> None:
        self.tensors.append(copy.deepcopy(pl_module.net.state_dict()))
        self.modes.append({name: module.training for name, module in pl_module.net.named_modules()})


def train(module: Classifier) -> States:
    """Train and evaluate after each step."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(8 * STEPS, 3, 8, 8, generator=generator), torch.arange(8 * STEPS) % 7
    loader, states = DataLoader(TensorDataset(images, labels, torch.arange(len(images))), 8), States()
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    options = {"max_steps": STEPS, "max_epochs": -1, "val_check_interval": 1, "num_sanity_val_steps": 1}
    pl.Trainer(accelerator="cpu", callbacks=[states], **options, **quiet).fit(module, loader, loader)
    return states


def changed(states: States, step: int, net: nn.Module) -> set[str]:
    """The parts of which a tensor has changed after so many steps."""
    before = net.state_dict()
    names = {name for name, tensor in states.tensors[step - 1].items() if not torch.equal(tensor, before[name])}
    return {name.removeprefix("stages.").partition(".")[0] for name in names}


@pytest.mark.parametrize(
    ("architecture", "variant"), [("resnet", "resnet18"), ("convnext", "convnext_tiny"), ("coatnet", "coatnet_0")]
)
def test_the_rates_of_stages_are_timms(architecture: str, variant: str) -> None:
    """Where timm groups by stage; by default it groups by block, and MobileNet's and EfficientNet's by channels."""
    net = build(architecture, variant, num_classes=10, image_size=224)
    groups = Classifier(net, num_classes=10, recipe=make_recipe(layer_decay=0.7)).rate_groups()
    scales = {one.data_ptr(): (group.scale, group.decays) for group in groups for one in group.parameters}
    assert groups[0].scale == 1.0, "the first group is the head: its rate is that of the recipe"
    published = publish(net, variant, names="timm")
    ours = dict(zip(published.tensors, net.state_dict().values(), strict=True))
    theirs = timm.create_model(published.network, num_classes=10)
    theirs.group_matcher = partial(lambda matcher, coarse: matcher(coarse=True), theirs.group_matcher)
    names = {id(parameter): name for name, parameter in theirs.named_parameters()}
    assert len(names) == len(scales) > 60
    for group in param_groups_layer_decay(theirs, layer_decay=0.7, weight_decay=0.1):
        for parameter in group["params"]:
            scale, decays = scales[ours[names[id(parameter)]].data_ptr()]
            assert scale == pytest.approx(group["lr_scale"], abs=1e-6), names[id(parameter)]
            if "relative_position_bias" not in names[id(parameter)]:
                assert decays == (group["weight_decay"] > 0), names[id(parameter)]


def test_each_group_follows_the_schedule_at_its_own_rate() -> None:
    module = Classifier(normed(), num_classes=7, recipe=make_recipe(layer_decay=0.5, schedule=cosine))
    rates: list[list[float]] = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *rest: object) -> None:
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    images = DataLoader(TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) % 7, torch.arange(8)), 4)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    pl.Trainer(accelerator="cpu", max_steps=4, max_epochs=-1, callbacks=[Rates()], **quiet).fit(module, images)
    heights = [0.1, 0.1, 0.05, 0.05, 0.025, 0.025, 0.0125, 0.0125]  # decayed and not, from the head to the stem
    assert rates == [pytest.approx([height * cosine(step / 4) for height in heights]) for step in range(4)]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop", "lamb", "muon"])
def test_frozen_parts_keep_every_bit(optimizer: str) -> None:
    words = (f"optimizer={optimizer}", "recipe.optimizer.lr=0.1", "recipe.optimizer.weight_decay=0.5")
    recipe = build_recipe(compose("train", ["+model=resnet", *words, "recipe.freeze=[stem,stage2]"]))
    module = Classifier(normed(), num_classes=7, recipe=recipe)
    before, states = copy.deepcopy(module.net), train(module)
    assert changed(states, STEPS, before) == {"stage1", "head"}
    for modes in states.modes:
        names = {name for name, is_training in modes.items() if not is_training}
        assert {"stem.0.1", "stem.1", "stages.stage2.1"} <= names, "norms and dropout as in an evaluation"
        assert all(name.startswith(("stem", "stages.stage2")) for name in names)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop", "lamb", "muon"])
def test_the_head_trains_alone_at_first(optimizer: str) -> None:
    words = (f"optimizer={optimizer}", "recipe.optimizer.lr=0.1", "recipe.optimizer.weight_decay=0.5")
    recipe = build_recipe(compose("train", ["+model=resnet", *words, "recipe.head_warmup=0.5", "recipe.epochs=1"]))
    module = Classifier(normed(), num_classes=7, recipe=recipe)
    before, states = copy.deepcopy(module.net), train(module)
    weights = {name for name, _ in before.named_parameters()}
    for step in (1, 2):
        same = {name for name in weights if torch.equal(states.tensors[step - 1][name], before.state_dict()[name])}
        assert same == {name for name in weights if not name.startswith("head")}
    assert changed(states, 3, before) == {"stem", "stage1", "stage2", "head"}


def test_the_other_parts_rise_when_they_join() -> None:
    recipe = make_recipe(schedule=partial(cosine, final_fraction=1.0), warmup=0.1, head_warmup=0.25)
    lengths = {"steps_per_epoch": 10, "num_steps": 40}
    head = [recipe.lr_factor(step, **lengths) for step in range(40)]
    others = [recipe.body_lr_factor(step, **lengths) for step in range(40)]
    assert head == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 37])
    assert others == pytest.approx([*[0.0] * 10, 0.25, 0.5, 0.75, *[1.0] * 27])
    without = make_recipe(schedule=cosine, warmup=0.1)
    assert all(without.body_lr_factor(step, **lengths) == without.lr_factor(step, **lengths) for step in range(40))


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^freeze=body is not one of stem, stage1, stage2$"):
        frozen_parts(normed(), ["body"])
    with pytest.raises(ValueError, match=r"^freeze=head is not one of stem, stage1, stage2$"):
        frozen_parts(normed(), ["head"])
    foreign = nn.Sequential(nn.Flatten(), nn.Linear(12, 7))
    with pytest.raises(ValueError, match=r"^freeze=stem is no part of this network, which has no stages$"):
        Classifier(foreign, num_classes=7, recipe=make_recipe(freeze=["stem"]))
    with pytest.raises(ValueError, match=r"^layer_decay and head_warmup need a network of stem, stages and head: set"):
        Classifier(foreign, num_classes=7, recipe=make_recipe(layer_decay=0.5)).rate_groups()
