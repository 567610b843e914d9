"""Crops against torchvision's: the same range, distribution and centre."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image
from torchvision.transforms import RandomHorizontalFlip, RandomResizedCrop
from torchvision.transforms import functional as reference
from torchvision.transforms._presets import ImageClassification

from data.augment.crops import EvaluationCrop, ImageSize, TrainingCrop, random_resized_crop
from data.draws import uniform
from pipeline.cli.compose import compose

COUNT = 4000


def test_the_default_is_torchvisions_reference_preset() -> None:
    crops = instantiate(compose("train", ["+model=resnet", "data=shards", "data.root=any"]).augment, _convert_="all")
    ours, theirs = crops["training"], RandomResizedCrop(224)
    assert (ours.image_size, ours.scale, ours.ratio) == (224, list(theirs.scale), pytest.approx(list(theirs.ratio)))
    assert ours.flip == RandomHorizontalFlip().p
    evaluation, preset = crops["evaluation"], ImageClassification(crop_size=224)  # its resize_size is 256
    assert evaluation.image_size / evaluation.crop_fraction == preset.resize_size[0]
    assert (evaluation.image_size,) == tuple(preset.crop_size)


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (32, 32), (30, 900), (900, 30)])
def test_random_crops_have_torchvisions_distribution(size: tuple[int, int]) -> None:
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
    deciles = np.linspace(0, 1, 11)[1:-1]
    for column in range(4):
        expected = np.quantile(theirs[:, column], deciles)
        np.testing.assert_allclose(np.quantile(ours[:, column], deciles), expected, atol=0.02 * size[column % 2] + 1)


def test_a_crop_depends_on_seed_epoch_and_sample_alone() -> None:
    crop = TrainingCrop(224)
    sizes = np.random.default_rng(0).integers(20, 600, (50, 2))
    together = crop.crops(sizes, np.arange(50), seed=1, epoch=2)
    alone = crop.crops(sizes[[31]], np.array([31]), seed=1, epoch=2)
    for name in ("anchor", "shape", "mirror"):
        np.testing.assert_array_equal(getattr(alone, name)[0], getattr(together, name)[31])
    assert not np.array_equal(crop.crops(sizes, np.arange(50), seed=1, epoch=3).anchor, together.anchor)


def test_half_of_the_images_are_mirrored() -> None:
    def mirrored(crop: TrainingCrop) -> float:
        return crop.crops(np.full((COUNT, 2), 100), np.arange(COUNT), seed=0, epoch=0).mirror.mean()

    assert mirrored(TrainingCrop(32)) == pytest.approx(0.5, abs=0.03)
    assert mirrored(TrainingCrop(32, flip=0.0)) == 0
    assert mirrored(TrainingCrop(32, flip=1.0)) == 1


@pytest.mark.parametrize("image_size", [[32, 256], [256, 16]])
def test_a_crop_of_a_tiny_image_has_a_pixel(image_size: ImageSize) -> None:
    sizes = np.array([(1, 1), (2, 2), (1, 9), (9, 1), (3, 5)], np.int64)
    for epoch in range(20):
        windows = TrainingCrop(image_size).crops(sizes, np.arange(5), seed=0, epoch=epoch)
        assert (windows.shape >= 1).all()
        assert (windows.anchor >= 0).all()
        assert (windows.anchor + windows.shape <= sizes).all()


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (333, 517), (256, 256), (257, 300), (40, 31)])
def test_the_evaluation_crop_is_torchvisions_center_crop(size: tuple[int, int]) -> None:
    crops = EvaluationCrop(224).crops(np.array([size]), np.array([0]), seed=0, epoch=0)
    # Each pixel of this image is its own coordinates, so torchvision's output gives the position of its crop.
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in size)
    coordinates = torch.stack(torch.meshgrid(rows + 0.5, columns + 0.5, indexing="ij"))  # (2, H, W)
    cropped = reference.center_crop(reference.resize(coordinates, [256], antialias=True), [224])
    expected = cropped[:, 111:113, 111:113].mean(dim=(1, 2)).numpy()
    center = (crops.roi_start + crops.roi_end)[0] / 2 + crops.anchor[0]
    np.testing.assert_allclose(center, expected, atol=1e-3 * max(size))


@pytest.mark.parametrize(
    "wrong",
    [{"scale": (0.0, 1.0)}, {"scale": (0.5, 0.2)}, {"ratio": (2.0, 1.0)}, {"flip": 1.5}, {"image_size": 0}],
)
def test_an_invalid_training_crop_is_rejected(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(wrong))}="):
        TrainingCrop(**{"image_size": 32, **wrong})
