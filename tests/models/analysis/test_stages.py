"""What becomes of an image, against the notes' table where that is right and the true numbers where it is not."""

from __future__ import annotations

import pytest
import torchvision

from models.analysis.stages import Moment, lifecycle
from models.analysis.summary import inspect
from tests.support.networks import build, on_meta
from tests.support.published import PUBLISHED


def moments(variant: str, image: tuple[int, int, int] = (3, 224, 224)) -> dict[str, Moment]:
    row = next(row for row in PUBLISHED if row.variant == variant)
    return {moment.stage: moment for moment in lifecycle(inspect(on_meta(row), image))}


def test_resnet18_ends_where_its_paper_says_and_footnotes_say_where_the_sketch_differs() -> None:
    told = moments("resnet18")
    assert [(moment.stage, moment.shape, moment.field) for moment in told.values()] == [
        ("input", (3, 224, 224), "1x1 px"),
        ("stem", (64, 56, 56), "11x11 px"),
        ("stage1", (64, 56, 56), "43x43 px"),
        ("stage2", (128, 28, 28), "99x99 px"),
        ("stage3", (256, 14, 14), "211x211 px"),
        ("stage4", (512, 7, 7), "435x435 px"),
        ("pooled", (512,), "whole image"),
        ("logits", (1000,), "whole image"),
    ]
    assert [stage for stage, moment in told.items() if moment.footnote] == ["stem", "stage2", "stage3", "stage4"]
    for stage, sketched in {"stage2": "128x56x56 and 35x35", "stage3": "256x28x28 and 91x91"}.items():
        assert f"The usual sketch of a CNN has {sketched} px after {stage}" in (told[stage].footnote or "")


def test_the_sketch_is_made_of_what_its_footnotes_say() -> None:
    deep, shallow = moments("resnet50"), moments("resnet18")
    assert (deep["stage1"].field, deep["stage1"].shape[1:]) == ("35x35 px", (56, 56))
    assert (deep["stage2"].field, deep["stage2"].shape[1:]) == ("91x91 px", (28, 28))
    assert [shallow[stage].shape[0] for stage in ("stage2", "stage3")] == [128, 256]
    assert (shallow["stage4"].field, deep["stage4"].field) == ("435x435 px", "427x427 px")


def test_networks_without_named_stages_are_parted_where_their_maps_change() -> None:
    told = lifecycle(inspect(torchvision.models.densenet121(), (3, 224, 224)))
    # Huang et al. 2017, table 1; each map ends in front of a pooling.
    assert [(moment.stage, moment.shape) for moment in told] == [
        ("input", (3, 224, 224)),
        ("features at 112x112", (64, 112, 112)),
        ("features at 56x56", (128, 56, 56)),
        ("features at 28x28", (256, 28, 28)),
        ("features at 14x14", (512, 14, 14)),
        ("features at 7x7", (1024, 7, 7)),
        ("the network itself", (1024, 1, 1)),
        ("logits", (1000,)),
    ]
    assert told[-2].meaning == "summary of the image"


@pytest.mark.parametrize(("variant", "size"), [("resnet18", 64), ("resnet18", 256), ("lenet5", 32)])
def test_other_images_have_no_footnotes(variant: str, size: int) -> None:
    architecture = "lenet" if variant == "lenet5" else "resnet"
    told = lifecycle(inspect(build(architecture, variant, image_size=size), (3, size, size)))
    assert len(told) > 4
    assert not any(moment.footnote for moment in told)


def test_what_agrees_with_the_sketch_has_no_footnote() -> None:
    assert moments("vgg16")["stage2"].shape == (128, 56, 56)
    assert moments("coatnet_0")["stem"].field == "7x7 px"
    assert moments("coatnet_0")["stem"].footnote is None
    assert moments("vgg16")["stage2"].footnote is not None
