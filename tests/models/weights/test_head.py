"""The last layer of a file for a network with other classes, row by row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.layers import ConvNet
from models.weights.head import ClassNames
from models.weights.load import LoadedWeights, load_weights
from tests.support.networks import build, plain

CATS_AND_DOGS = ("bird", "cat", "dog", "frog")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Weights of a network with four classes."""
    torch.manual_seed(0)
    torch.save(plain(num_classes=4).state_dict(), tmp_path / "four.pth")
    return tmp_path / "four.pth"


def load(file: Path, theirs: tuple[str, ...] | None, *ours: str, extra: int = 0) -> tuple[ConvNet, LoadedWeights]:
    """Load the file into another network of these classes, with more outputs than those if `extra`."""
    torch.manual_seed(1)
    net = plain(num_classes=len(ours) + extra)
    return net, load_weights(net, file, head=ClassNames(theirs, ours))


def rows(net: ConvNet) -> Tensor:
    """Weight and bias of each class."""
    last = net.head.linear
    return torch.cat([last.weight, last.bias[:, None]], 1)


def rows_of(file: Path) -> Tensor:
    state = torch.load(file, weights_only=True)
    return torch.cat([state["head.linear.weight"], state["head.linear.bias"][:, None]], 1)


@pytest.mark.parametrize(
    ("theirs", "ours", "copied", "description"),
    [
        (CATS_AND_DOGS, CATS_AND_DOGS, {0: 0, 1: 1, 2: 2, 3: 3}, "kept: the file has the same classes"),
        (CATS_AND_DOGS, CATS_AND_DOGS[::-1], {0: 3, 1: 2, 2: 1, 3: 0}, "rows of frog, dog, cat and 1 more copied by"),
        (
            CATS_AND_DOGS,
            ("ant", "dog", "cow", "bird", "bee"),
            {1: 2, 3: 0},
            "rows of dog, bird copied by class name; 3 others are new",
        ),
        (CATS_AND_DOGS, ("ant", "bee", "cow", "eel"), {}, "new: the file has other classes"),
        (
            None,
            ("ant", "bee", "cow", "eel"),
            {0: 0, 1: 1, 2: 2, 3: 3},
            "kept: the file has 4 classes too, without names",
        ),
        (None, ("cat", "dog"), {}, "new: the file has 4 classes, the network 2"),
    ],
)
def test_rows_follow_class_names(
    file: Path, theirs: tuple[str, ...] | None, ours: tuple[str, ...], copied: dict[int, int], description: str
) -> None:
    net, loaded = load(file, theirs, *ours)
    torch.manual_seed(1)
    before, their_rows = rows(plain(num_classes=len(ours))), rows_of(file)
    assert not torch.equal(before[0], their_rows[0])
    for number in range(len(ours)):
        expected = their_rows[copied[number]] if number in copied else before[number]
        assert torch.equal(rows(net)[number], expected), ours[number]
    assert torch.equal(net.stem[0].weight, torch.load(file, weights_only=True)["stem.0.weight"])
    assert loaded.head is not None
    assert loaded.head.startswith(description)


def test_a_network_without_classes_takes_as_many(file: Path) -> None:
    net = plain(num_classes=4)
    loaded = load_weights(net, file, head=ClassNames(CATS_AND_DOGS, None))
    assert torch.equal(rows(net), rows_of(file))
    assert loaded.head == "kept: the file has 4 classes too, without names to compare"


def test_outputs_without_a_class_are_new(file: Path) -> None:
    net, loaded = load(file, CATS_AND_DOGS, "dog", "bird", extra=2)
    assert torch.equal(rows(net)[:2], rows_of(file)[[2, 0]])
    assert loaded.head == "rows of dog, bird copied by class name; 2 others are new"


def test_a_kernel_of_another_publisher_is_a_row(tmp_path: Path) -> None:
    """timm's VGG has a last layer like ours; as kernels of one pixel its rows are the same."""
    torch.manual_seed(0)
    state = build("vgg", "vgg11", num_classes=4, image_size=32).state_dict()
    state["head.linear3.weight"] = state["head.linear3.weight"][..., None, None]
    torch.save(state, tmp_path / "kernels.pth")
    net = build("vgg", "vgg11", num_classes=2, image_size=32)
    load_weights(net, tmp_path / "kernels.pth", head=ClassNames(CATS_AND_DOGS, ("frog", "ant")))
    assert torch.equal(net.head.linear3.weight[0], state["head.linear3.weight"][3].flatten())


def test_a_file_whose_last_tensors_are_no_layer_is_refused(tmp_path: Path) -> None:
    torch.save({"scale": torch.ones(3), "shift": torch.ones(3)}, tmp_path / "norm.pth")
    with pytest.raises(ValueError, match=r"head=auto: scale \(3,\), shift \(3,\) are not the last layer of a class"):
        load(tmp_path / "norm.pth", None, "cat", "dog")
