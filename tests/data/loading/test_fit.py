"""Images cut, padded or squashed to squares and rectangles, against torchvision's resize of PIL's pixels."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as v2

from data.augment.augmentation import Augmentation
from data.augment.crops import MEAN_COLOUR, EvaluationCrop, Fit, ImageSize, TrainingCrop
from data.loading.decoder import DecodeSettings
from data.loading.loader import Loader
from data.loading.order import EvaluationPlan
from data.shards.dataset import Dataset
from data.storage.local import LocalShards
from tests.support.decoded import decode_by_pil, first_and_last, levels
from tests.support.loaders import training

SIZES = [64, (48, 96), (96, 40)]


def resize_with_edges(image: torch.Tensor, size: list[int]) -> torch.Tensor:
    """Resize by torchvision with the pixels of each edge repeated outside, as in DALI: (3, h, w) -> (3, H, W)."""
    height, width = image.shape[1:]
    large = v2.pad(image, [width, height, width, height], padding_mode="edge")
    resized = v2.resize(large, [3 * size[0], 3 * size[1]], antialias=True)
    return resized[:, size[0] : 2 * size[0], size[1] : 2 * size[1]]


def fitted(image: torch.Tensor, fit: str, *, size: tuple[int, int], crop_fraction: float) -> torch.Tensor:
    """Fit an image by torchvision: (3, h, w) -> (3, H, W)."""
    (height, width), frame = image.shape[1:], [round(side / crop_fraction) for side in size]
    scales = [side / own for side, own in zip(frame, (height, width), strict=True)]
    if fit == Fit.SQUASH:
        resized = frame
    elif fit == Fit.PAD:
        resized = [max(1, int(own * min(scales) + 1e-9)) for own in (height, width)]
    else:
        resized = [int(own * max(scales) + 1e-9) for own in (height, width)]
    image = resize_with_edges(image, resized)
    top, left = (round((side - own) / 2) for side, own in zip(size, resized, strict=True))
    bottom, right = size[0] - resized[0] - top, size[1] - resized[1] - left
    padded = torch.stack(
        [
            v2.pad(plane, [max(left, 0), max(top, 0), max(right, 0), max(bottom, 0)], fill=level)
            for plane, level in zip(image[:, None], MEAN_COLOUR, strict=True)
        ],
        1,
    )[0]
    return v2.center_crop(padded, list(size))


@pytest.mark.parametrize("crop_fraction", [1.0, 0.8])
@pytest.mark.parametrize("image_size", SIZES, ids=str)
@pytest.mark.parametrize("fit", list(Fit))
def test_an_evaluated_image_is_fitted_as_by_torchvision(
    photographs: Dataset, fit: str, image_size: ImageSize, crop_fraction: float
) -> None:
    crop = EvaluationCrop(image_size, crop_fraction, fit=fit)
    index, augment = photographs.index("val"), Augmentation(crop)
    decode, plan = DecodeSettings(photographs.mean, photographs.std), EvaluationPlan(len(index), 16)
    loader = Loader(index, LocalShards(photographs.root), plan=plan, augment=augment, decode=decode)
    images = levels(photographs, torch.cat([batch.images for batch in loader]))
    for sample in first_and_last(photographs, "val"):
        image = v2.pil_to_tensor(decode_by_pil(photographs, "val", sample))
        expected = fitted(image, fit, size=augment.size, crop_fraction=crop_fraction).permute(1, 2, 0).numpy()
        assert np.abs(images[sample] - expected).max() < 1.001, sample


@pytest.mark.parametrize("image_size", SIZES, ids=str)
@pytest.mark.parametrize("fit", list(Fit))
def test_a_training_crop_is_fitted_as_by_torchvision(photographs: Dataset, fit: str, image_size: ImageSize) -> None:
    loader = training(photographs, crop=TrainingCrop(image_size, fit=fit))
    size = loader.augment.size
    batches = list(itertools.islice(loader, 2))
    assert sum(len(batch.samples) for batch in batches) == 16
    for batch in batches:
        rows, numbers = loader.index.rows(batch.samples.numpy()), batch.samples.numpy()
        sizes = np.stack([rows.height, rows.width], axis=1).astype(np.int64)
        crops = loader.augment.crop.crops(sizes, numbers, seed=0, epoch=0)
        for position, sample in enumerate(numbers.tolist()):
            (top, left), (height, width) = crops.anchor[position].tolist(), crops.shape[position].tolist()
            image = v2.pil_to_tensor(decode_by_pil(photographs, "train", sample))
            image = image[:, top : top + height, left : left + width]
            if fit == Fit.PAD:
                expected = fitted(image, fit, size=size, crop_fraction=1.0)
            else:
                expected = v2.resize(image, list(size), antialias=True)
            expected = v2.hflip(expected) if crops.mirror[position] else expected
            found = levels(photographs, batch.images[position : position + 1])[0]
            assert np.abs(found - expected.permute(1, 2, 0).numpy()).max() < 1.001, sample


@pytest.mark.parametrize("fit", list(Fit))
def test_a_crop_has_the_shape_of_the_output_or_of_the_image(fit: str) -> None:
    sizes = np.random.default_rng(0).integers(50, 900, (2000, 2))
    crop = TrainingCrop((100, 300), scale=(0.1, 0.1), ratio=(1.0, 1.0), fit=fit)
    shape = crop.crops(sizes, np.arange(2000), seed=0, epoch=0).shape
    expected = 3.0 if fit == Fit.CROP else sizes[:, 1] / sizes[:, 0]
    is_free = shape.prod(1) < 0.11 * sizes.prod(1)  # where a crop of that shape fits
    relative = (shape[:, 1] / shape[:, 0] / expected)[is_free]
    assert is_free.mean() > (0.5 if fit == Fit.CROP else 0.99)
    np.testing.assert_allclose(relative, 1, atol=0.15)


def test_padding_keeps_all_of_an_image() -> None:
    crop = replace(TrainingCrop((100, 300), scale=(1.0, 1.0), ratio=(1.0, 1.0)), fit=Fit.PAD)
    sizes = np.array([[50, 50], [300, 100], [100, 300], [1, 500]])
    crops = crop.crops(sizes, np.arange(4), seed=0, epoch=0)
    assert np.array_equal(crops.shape, sizes)
    assert crops.resized is not None
    assert crops.offset is not None
    assert crops.resized.tolist() == [[100, 100], [100, 33], [100, 300], [1, 300]]
    assert crops.offset.tolist() == [[0, 100], [0, 134], [0, 0], [50, 0]]


@pytest.mark.parametrize("kind", [TrainingCrop, EvaluationCrop])
@pytest.mark.parametrize(
    "wrong",
    [
        *({"image_size": size} for size in (0, [1, 2, 3], [0, 5], "32", [32.0, 32], [], True)),
        *({"fit": fit} for fit in ("", "cut", None)),
        *({"fill": fill} for fill in ([1, 2], [1, 2, 256], [0.5, 1, 1])),
    ],
    ids=str,
)
def test_another_value_is_refused(kind: type, wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(wrong))}="):
        kind(**{"image_size": 32, **wrong})
