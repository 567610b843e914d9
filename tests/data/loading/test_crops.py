"""Windows against torchvision's: the same range, the same distribution, the same centre."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image
from torchvision.transforms import RandomHorizontalFlip, RandomResizedCrop
from torchvision.transforms import functional as reference
from torchvision.transforms._presets import ImageClassification

from data.loading.crops import EvaluationView, TrainingView, random_resized_crop
from data.loading.order import uniform
from pipeline.cli.config import compose

COUNT = 4000


def test_the_default_is_torchvisions_reference_preset() -> None:
    views = instantiate(compose("train", ["+model=resnet", "data=shards", "data.root=any"]).augment, _convert_="all")
    ours, theirs = views["training"], RandomResizedCrop(224)
    assert (ours.image_size, ours.scale, ours.ratio) == (224, list(theirs.scale), pytest.approx(list(theirs.ratio)))
    assert ours.flip == RandomHorizontalFlip().p
    preset = ImageClassification(crop_size=224)  # whose resize_size is 256
    assert views["evaluation"].image_size / views["evaluation"].crop_fraction == preset.resize_size[0]
    assert (views["evaluation"].image_size,) == tuple(preset.crop_size)


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (32, 32), (30, 900), (900, 30)])
def test_random_windows_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    sizes = np.tile([size], (COUNT, 1))
    draws = uniform(np.arange(COUNT), 40, seed=0, epoch=0)
    anchor, shape = random_resized_crop(sizes, draws, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    torch.manual_seed(0)
    image = Image.new("L", (size[1], size[0]))
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(COUNT)])
    ours = np.concatenate([anchor, shape], axis=1)  # (COUNT, 4): top, left, height, width
    assert (anchor >= 0).all()
    assert (anchor + shape <= sizes).all()
    assert (shape >= 1).all()
    # Deciles of each number within 2 % of the side: two samples of 4,000 from one distribution are within 1.5 %.
    probabilities = np.linspace(0, 1, 11)[1:-1]
    for column in range(4):
        mine, its = np.quantile(ours[:, column], probabilities), np.quantile(theirs[:, column], probabilities)
        np.testing.assert_allclose(mine, its, atol=0.02 * size[column % 2] + 1)


def test_a_window_belongs_to_seed_epoch_and_sample() -> None:
    view = TrainingView(224)
    sizes = np.random.default_rng(0).integers(20, 600, (50, 2))
    together = view.windows(sizes, np.arange(50), seed=1, epoch=2)
    alone = view.windows(sizes[[31]], np.array([31]), seed=1, epoch=2)
    for name in ("anchor", "shape", "mirror"):
        np.testing.assert_array_equal(getattr(alone, name)[0], getattr(together, name)[31])
    assert not np.array_equal(view.windows(sizes, np.arange(50), seed=1, epoch=3).anchor, together.anchor)


def test_half_of_the_images_are_mirrored() -> None:
    sizes = np.full((COUNT, 2), 100)
    samples = np.arange(COUNT)
    assert TrainingView(32).windows(sizes, samples, seed=0, epoch=0).mirror.mean() == pytest.approx(0.5, abs=0.03)
    assert TrainingView(32, flip=0.0).windows(sizes, samples, seed=0, epoch=0).mirror.sum() == 0
    assert TrainingView(32, flip=1.0).windows(sizes, samples, seed=0, epoch=0).mirror.sum() == COUNT


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (333, 517), (256, 256), (257, 300), (40, 31)])
def test_the_evaluated_region_is_torchvisions_center_crop(size: tuple[int, int]) -> None:
    windows = EvaluationView(224).windows(np.array([size]), np.array([0]), seed=0, epoch=0)
    # A picture of its own coordinates: what torchvision shows of it says where it looked.
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in size)
    coordinates = torch.stack(torch.meshgrid(rows + 0.5, columns + 0.5, indexing="ij"))  # (2, H, W)
    shown = reference.center_crop(reference.resize(coordinates, [256], antialias=True), [224])
    middle = shown[:, 111:113, 111:113].mean(dim=(1, 2)).numpy()
    region = (windows.roi_start + windows.roi_end)[0] / 2 + windows.anchor[0]
    np.testing.assert_allclose(region, middle, atol=1e-3 * max(size))


@pytest.mark.parametrize(
    "wrong",
    [{"scale": (0.0, 1.0)}, {"scale": (0.5, 0.2)}, {"ratio": (2.0, 1.0)}, {"flip": 1.5}, {"image_size": 0}],
)
def test_a_view_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainingView(**{"image_size": 32, **wrong})
