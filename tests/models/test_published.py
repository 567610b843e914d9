"""Parameters, costs and shapes of every variant equal the published ones, on torch's `meta` device."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.cli.compose import CONF, compose
from tests.support.networks import build, on_meta
from tests.support.published import PUBLISHED, SMALLEST, TIMM, TV, Published

ARCHITECTURES = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))


def test_there_is_a_row_for_every_config_and_a_config_for_every_row() -> None:
    assert len(PUBLISHED) >= 44
    assert set(ARCHITECTURES) == {row.architecture for row in PUBLISHED} == SMALLEST.keys()
    assert max(Counter((row.architecture, row.variant) for row in PUBLISHED).values()) == 1
    for architecture in ARCHITECTURES:
        variants = {row.variant: row.parameters for row in PUBLISHED if row.architecture == architecture}
        assert compose("train", [f"+model={architecture}"]).model.variant in variants
        with pytest.raises(ValueError, match="is not one of") as error:
            build(architecture, "?")
        named = str(error.value).partition(" is not one of ")[2].partition(":")[0].split(", ")
        assert sorted(named) == sorted(variants)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.variant)
def test_counts_and_shapes_are_the_published_ones(row: Published) -> None:
    images = torch.empty(2, row.in_channels, row.image_size, row.image_size, device="meta")
    net = on_meta(row)
    assert sum(parameter.numel() for parameter in net.parameters()) == row.parameters
    with FlopCounterMode(display=False) as counter:
        assert net(images).shape == (2, row.num_classes)
    gmacs = counter.get_total_flops() / 2 / len(images) / 1e9
    # Published with three decimals, LeNet's with six; timm counts by other rules.
    assert gmacs == pytest.approx(
        row.gmacs, rel=0.02 if row.source == TIMM else 2e-4, abs=6e-7 if row.gmacs < 0.01 else 6e-4
    )


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.variant)
def test_stages_end_where_the_resolution_changes(row: Published) -> None:
    net = on_meta(row)
    features = net.stem(torch.empty(1, row.in_channels, row.image_size, row.image_size, device="meta"))
    sides = [features.shape[-1]]
    for _, stage in net.stages.named_children():
        features = stage(features)
        sides.append(features.shape[-1])
    names = [name for name, _ in net.stages.named_children()]
    assert names == [f"stage{number}" for number in range(1, len(names) + 1)]
    # The first stage may keep the resolution of the stem, each other one has another resolution.
    assert len(set(sides[1:])) == len(names)
    assert all(before >= after for before, after in itertools.pairwise(sides))
    if row.source in (TV, TIMM) and row.image_size % 32 == 0:
        assert sides[-1] == row.image_size // 32 - (row.architecture == "alexnet")
