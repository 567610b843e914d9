"""The stages of a network against the notes' table where it holds, and the true numbers where it does not."""

from __future__ import annotations

import pytest
import torchvision

from models.analysis.stages import StageSummary, lifecycle
from models.analysis.summary import summarize
from tests.support.networks import build, on_meta
from tests.support.published import PUBLISHED


def stages_of(variant: str, image_shape: tuple[int, int, int] = (3, 224, 224)) -> dict[str, StageSummary]:
    row = next(row for row in PUBLISHED if row.variant == variant)
    return {stage.name: stage for stage in lifecycle(summarize(on_meta(row), image_shape))}


def test_resnet18_has_the_stages_of_its_paper_and_sketches_where_they_differ() -> None:
    stages = stages_of("resnet18")
    assert [(stage.name, stage.shape, stage.rows.size, stage.rows.is_global) for stage in stages.values()] == [
        ("input", (3, 224, 224), 1, False),
        ("stem", (64, 56, 56), 11, False),
        ("stage1", (64, 56, 56), 43, False),
        ("stage2", (128, 28, 28), 99, False),
        ("stage3", (256, 14, 14), 211, False),
        ("stage4", (512, 7, 7), 435, False),
        ("pooled", (512,), None, True),
        ("logits", (1000,), None, True),
    ]
    assert all(stage.rows == stage.columns for stage in stages.values())
    sketches = {name: (stage.sketch.shape, stage.sketch.field) for name, stage in stages.items() if stage.sketch}
    assert sketches == {
        "stem": ((64, 112, 112), 7),
        "stage2": ((128, 56, 56), 35),
        "stage3": ((256, 28, 28), 91),
        "stage4": ((512, 7, 7), 224),
    }


def test_the_sketch_consists_of_the_networks_that_its_reasons_name() -> None:
    deep, shallow = stages_of("resnet50"), stages_of("resnet18")
    assert (deep["stage1"].rows.size, deep["stage1"].shape[1:]) == (35, (56, 56))
    assert (deep["stage2"].rows.size, deep["stage2"].shape[1:]) == (91, (28, 28))
    assert [shallow[stage].shape[0] for stage in ("stage2", "stage3")] == [128, 256]
    assert (shallow["stage4"].rows.size, deep["stage4"].rows.size) == (435, 427)


def test_networks_without_named_stages_are_split_where_their_maps_change_size() -> None:
    stages = lifecycle(summarize(torchvision.models.densenet121(), (3, 224, 224)))
    # Huang et al. 2017, table 1; each map ends before a pooling.
    assert [(stage.name, stage.shape) for stage in stages] == [
        ("input", (3, 224, 224)),
        ("features at 112x112", (64, 112, 112)),
        ("features at 56x56", (128, 56, 56)),
        ("features at 28x28", (256, 28, 28)),
        ("features at 14x14", (512, 14, 14)),
        ("features at 7x7", (1024, 7, 7)),
        ("the network itself", (1024, 1, 1)),
        ("logits", (1000,)),
    ]
    assert stages[-2].meaning == "summary of the image"


@pytest.mark.parametrize(("variant", "size"), [("resnet18", 64), ("resnet18", 256), ("lenet5", 32)])
def test_other_image_sizes_have_no_sketch(variant: str, size: int) -> None:
    architecture = "lenet" if variant == "lenet5" else "resnet"
    stages = lifecycle(summarize(build(architecture, variant, image_size=size), (3, size, size)))
    assert len(stages) > 4
    assert not any(stage.sketch for stage in stages)


def test_stages_that_agree_with_the_sketch_have_none() -> None:
    assert stages_of("vgg16")["stage2"].shape == (128, 56, 56)
    assert stages_of("vgg16")["stage2"].sketch is not None
    assert stages_of("coatnet_0")["stem"].rows.size == 7
    assert stages_of("coatnet_0")["stem"].sketch is None
